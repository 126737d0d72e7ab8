"""Read candidates, training examples and evaluation tasks from text files, tables, JSON lines and BEIR folders.

`lines`, `jsonlines` and `tables` parse file formats; `candidates`, `examples` and `beir` interpret the rows.
"""
