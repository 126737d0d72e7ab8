"""Reading data: candidates, training examples and tasks, out of text, tables, JSON lines and BEIR folders.

`lines`, `jsonlines` and `tables` know files; `candidates`, `examples` and `beir` know what the rows mean.
"""
