"""`CandidateIndex`: documents encoded once, kept in a folder or in memory, changed in transactions, read by many.

Arrays lie in append-only files, everything else in one SQLite file beside them; docs/candidate-index.md describes the
format and its guarantees. This package knows no model. Bottom up: `schema` (the fields of a row), `rows` (which rows
are live), `shards` and `memory` (arrays on disk and in memory), `catalogue` (SQLite), `folder` (generations, pointer,
lock), `view` (reading), `transaction` and `writer` (writing), `copying`, `verification`, `compaction`, `newest_commit`,
`candidate_index` (the class); several as one: `sharded_view`, `shard_list`, `sharded_index`.
"""

from mixencoder.index.candidate_index import BuildEstimate, CandidateIndex, Estimate
from mixencoder.index.schema import Field, Schema
from mixencoder.index.sharded_index import ShardedIndex
from mixencoder.index.sharded_view import ShardedSnapshot, ShardInfo
from mixencoder.index.verification import Damage, Verification
from mixencoder.index.view import Chunk, Entry, Listing, Snapshot
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
    "Listing",
    "Repair",
    "Schema",
    "ShardInfo",
    "ShardedIndex",
    "ShardedSnapshot",
    "Snapshot",
    "Verification",
]
