"""Benchmarks of whole processes: start-up time, and threads next to other busy processes."""
