"""What the suite times: one module a group, each a list of cases (`benchmarks.contest.Case`).

Read by `bench_*.py`, which run them under pytest, and by the gate, `benchmarks.compare`.
"""
