"""How an index is kept: named arrays in append-only files, everything else in one SQLite file beside them.

`mixencoder.index.CandidateIndex` is the only caller; docs/candidate-index.md holds the format and its promises.

Bottom up: `schema` (what a row is), `rows` (which rows count), `shards` and `memory` (arrays on disk and in memory),
`catalogue` (SQLite), `folder` (generations, pointer, lock), `view` (reading), `transaction` (writing), `verification`.
"""
