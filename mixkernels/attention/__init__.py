"""Attention of many candidates to one query: its public operator, checks, and one module or two for each backend."""
