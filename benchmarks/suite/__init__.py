"""The suite: what is timed, one module a group, each a list of cases (`benchmarks.suite.case.Case`).

`benchmarks.bench_suite` runs them under pytest, `benchmarks.compare` as a gate; `results` keeps what they found.
"""
