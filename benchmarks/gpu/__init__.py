"""Operators on a GPU against their rivals: ``python -m benchmarks.gpu``."""
