"""Benchmarks of candidate indexes: speed, a million candidates, and the quality of stored precisions."""
