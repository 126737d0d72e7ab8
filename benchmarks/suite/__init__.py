"""The suite: one module per group, each with a list of cases (`benchmarks.suite.case.Case`).

`benchmarks.bench_suite` runs them under pytest, `benchmarks.compare` checks a few in CI; `results` stores the results.
"""
