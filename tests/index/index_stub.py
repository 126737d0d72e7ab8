"""A fast stand-in for a model: rows depend only on the text, so every test can recompute them."""

import contextlib
import math
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixencoder.index import CandidateIndex, Encoded, Entry, Field, Schema, Snapshot

SCHEMA = Schema((Field("context", (2, 3), "bfloat16"), Field("scale", (), "float32"), Field("code", (5,), "int8")))
FINGERPRINT = {"name": "stub", "model": "m1", "tokenizer": "t1"}


def rows_of(texts: Sequence[str]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the fields of texts and their row counts; every "|" in a text begins another row."""
    counts = [text.count("|") + 1 for text in texts]
    seeds = [zlib.crc32(f"{row}/{text}".encode()) for text, n in zip(texts, counts, strict=True) for row in range(n)]
    return fields_of(torch.tensor(seeds, dtype=torch.int64)), counts


def fields_of(seeds: Tensor) -> dict[str, Tensor]:
    values = seeds[:, None] * torch.arange(1, 7) % 251
    return {
        "context": values.view(-1, 2, 3).to(torch.bfloat16),
        "scale": (seeds % 65521).float(),
        "code": (values[:, :5] - 125).to(torch.int8),
    }


def encode(texts: Sequence[str], *, batch_size: int) -> Encoded:
    fields, counts = rows_of(texts)
    return Encoded(fields, counts, sum(text.startswith("cut") for text in texts))


def project(embeddings: Tensor) -> dict[str, Tensor]:
    return fields_of(embeddings[:, 0].to(torch.int64))


def create(path=None, **changes) -> CandidateIndex:
    options = {"schema": SCHEMA, "fingerprint": FINGERPRINT, "encode": encode, "project": project, **changes}
    return CandidateIndex.create(path, options.pop("schema"), options.pop("fingerprint"), **options)


def build(path=None, documents: Iterable[str] = (), ids: Iterable[str] | None = None, **changes) -> CandidateIndex:
    index = create(path, **changes)
    index.build(documents, ids)
    return index


def reopen(path, **options) -> CandidateIndex:
    return CandidateIndex.open(path, FINGERPRINT, encode=encode, project=project, **options)


def check(view: Snapshot, expected: Sequence[Entry], size: int = 1000) -> None:
    """Assert that every way of reading a view gives exactly these entries in this order."""
    ids = [entry.id for entry in expected]
    assert len(view) == len(expected)
    assert list(view) == ids
    assert list(view.entries()) == list(expected)
    assert view.positions(ids).tolist() == list(range(len(ids)))
    positions = list(range(len(ids)))[::-1]
    assert view.ids(positions) == ids[::-1]
    assert view.texts(positions) == [entry.text for entry in expected][::-1]
    fields, counts = rows_of([entry.text for entry in expected])
    assert view.rows == sum(counts)
    owners = torch.arange(len(ids)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    chunks = list(view.chunks(size))
    assert all(0 < len(chunk.positions) <= size for chunk in chunks)
    # besides the last one, a chunk is shorter only where a shard ends
    shards = math.ceil((view.rows + view.removed_rows) / view.manifest.shard_rows)
    assert len(chunks) <= math.ceil(view.rows / size) + max(shards - 1, 0)
    if chunks:
        assert torch.cat([torch.from_numpy(chunk.positions) for chunk in chunks]).equal(owners)
        for name, rows in fields.items():
            assert torch.cat([chunk.fields[name] for chunk in chunks]).equal(rows)
    gathered = view.gather(positions)
    fields, counts = rows_of([entry.text for entry in expected][::-1])
    expected_positions = [position for position, n in zip(positions, counts, strict=True) for _ in range(n)]
    assert gathered.positions.tolist() == expected_positions
    assert all(gathered.fields[name].equal(rows) for name, rows in fields.items())


def as_format_1(path: Path) -> None:
    """Turn an index into one of format 1, whose block records have no checksums."""
    with contextlib.closing(sqlite3.connect(next(path.glob("generation-*")) / "catalogue.sqlite")) as connection:
        connection.execute("ALTER TABLE blocks DROP COLUMN checksum")
        connection.execute("DELETE FROM manifest WHERE name = 'state'")
        connection.commit()
    pointer = path / "index.json"
    pointer.write_text(pointer.read_text().replace('"format": 2', '"format": 1'))
