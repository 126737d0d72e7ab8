"""`CandidateIndex`: candidates encoded once, kept in a folder or in memory, updated in transactions, read by many.

Named arrays in append-only files, everything else in one SQLite file beside them; docs/candidate-index.md holds the
format and its promises. No model is known here. Bottom up: `schema` (what a row is), `rows` (which rows count),
`shards` and `memory` (arrays on disk and in memory), `catalogue` (SQLite), `folder` (generations, pointer, lock),
`view` (reading), `transaction` and `writer` (writing), `verification`, `compaction`, `candidate_index` (the class).
"""

from mixencoder.index.candidate_index import BuildEstimate, CandidateIndex, Estimate
from mixencoder.index.schema import Field, Schema
from mixencoder.index.verification import Damage, Verification
from mixencoder.index.view import Chunk, Entry, Snapshot
from mixencoder.index.writer import AddResult, Encoded, Repair

__all__ = [
    "AddResult",
    "BuildEstimate",
    "CandidateIndex",
    "Chunk",
    "Damage",
    "Encoded",
    "Entry",
    "Estimate",
    "Field",
    "Repair",
    "Schema",
    "Snapshot",
    "Verification",
]
