"""Benchmarks: run ``pytest --benchmark-only`` from the root; plain ``pytest`` skips them."""
