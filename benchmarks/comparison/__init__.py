"""Six architectures on one backbone, one data set and one trainer: ``python -m benchmarks.comparison TASK``."""
