"""The files of an index: layout and sizes, and the effects of damage, unfinished writes and a full disk."""

import errno
import json
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixencoder.errors import IndexDamagedError, IndexStateError, IndexStorageError
from mixencoder.index import CandidateIndex, Entry, Field, Repair, Schema, shards
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.rows import BitVector
from tests.index.index_stub import FINGERPRINT, SCHEMA, build, check, create, reopen, rows_of

TEXTS = [f"text {i}" + "|more" * (i % 3) for i in range(1500)]
IDS = [f"id {i}" for i in range(1500)]
ENTRIES = [Entry(id, text, None) for id, text in zip(IDS, TEXTS, strict=True)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An index of 1,500 documents with 3,000 rows in three shards, closed."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    build(tmp_path / "index", TEXTS, IDS).close()
    return tmp_path / "index"


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        (value,) = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([value ^ 1]))


@given(bits=st.lists(st.booleans(), max_size=400), repeats=st.integers(1, 3))
@settings(deadline=None)
def test_rank_and_select_count_bits(bits, repeats):
    bits = np.array(bits * repeats, dtype=bool)
    packed = np.packbits(bits, bitorder="little").tobytes()
    vector = BitVector.from_bytes(packed + bytes(-len(packed) % 8))
    where = np.flatnonzero(bits)
    positions = np.arange(len(bits) + 1)
    assert vector.count == len(where)
    assert vector.rank(positions).tolist() == np.concatenate([[0], np.cumsum(bits)]).tolist()
    assert vector.select(np.arange(len(where))).tolist() == where.tolist()
    assert vector.test(positions[:-1]).tolist() == bits.tolist()
    for first in range(0, len(where), 7):
        assert vector.select_range(first, len(where)).tolist() == where[first:].tolist()


def test_array_files_hold_the_rows_and_nothing_else(path):
    fields, _ = rows_of(TEXTS)
    for field in SCHEMA.fields:
        files = sorted(path.glob(f"generation-000001/shard-*.{field.name}.bin"))
        assert [file.stat().st_size for file in files] == [rows * field.row_bytes for rows in (1024, 1024, 952)]
        found = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=field.torch_dtype)
        assert found.view(-1, *field.shape).equal(fields[field.name])


def test_a_shard_of_the_shipped_size_stays_within_256_mib():
    for width in (1, 7, 384, 5000):
        schema = Schema((Field("a", (width,), "float32"), Field("b", (3,), "int8")))
        rows = shards.rows_per_shard(schema)
        assert rows % 1024 == 0
        assert rows * schema.row_bytes <= 256 * 2**20 < (rows + 1024) * schema.row_bytes


def test_opening_reads_one_record_in_1024_rows(path, monkeypatch):
    read = []
    query, checked = Catalogue._query, Catalogue._checked_block

    def counted(self, *arguments):
        rows = query(self, *arguments)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(Catalogue, "_query", counted)
    monkeypatch.setattr(Catalogue, "_checked_block", lambda *block: read.append(1) or checked(*block))
    assert reopen(path).snapshot().rows == 3000
    # three blocks, seven rows of the manifest, and the version two or three times
    assert sum(read) <= 14


def test_streaming_from_disk_allocates_little_memory(tmp_path):
    schema = Schema((Field("context", (16384,), "float16"),))
    index = CandidateIndex.create(
        tmp_path / "index", schema, FINGERPRINT, project=lambda rows: {"context": rows.half()}
    )
    index.build(embeddings=torch.zeros(0, 16384))
    for first in range(0, 3000, 500):
        index.add(embeddings=torch.randn(500, 16384), ids=[str(first + i) for i in range(500)])

    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    view = index.snapshot()
    before, most = anonymous(), 0
    for chunk in view.chunks(64):
        chunk.fields["context"].sum()
        most = max(most, anonymous() - before)
    assert most < 0.2 * index.info()["array_bytes"]


def test_bytes_beyond_the_committed_rows_are_never_returned(path):
    generation = path / "generation-000001"
    for file in generation.glob("shard-00002.*"):
        with file.open("ab") as opened:
            opened.write(os.urandom(333))
    stray = [generation / f"shard-0000{n}.{field.name}.bin" for n in (3, 4) for field in SCHEMA.fields]
    for file in stray:
        file.write_bytes(os.urandom(100))
    index = reopen(path)
    check(index.snapshot(), ENTRIES)
    index.add(["new|one"], ["new"])
    check(index.snapshot(), [*ENTRIES, Entry("new", "new|one", None)])
    assert index.verify().ok
    assert not any(file.exists() for file in stray)


def test_rows_are_written_and_flushed_before_the_commit_that_makes_them_count(path, monkeypatch):
    waiting, events = set(), []
    pwrite, fsync, write = os.pwrite, os.fsync, Catalogue.write

    def spied_pwrite(descriptor, *arguments):
        if (name := str(Path(f"/proc/self/fd/{descriptor}").readlink())).endswith(".bin"):
            waiting.add(name)
            events.append("rows")
        return pwrite(descriptor, *arguments)

    def spied_fsync(descriptor):
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        waiting.discard(name)
        events.append("folder" if Path(name).is_dir() else "flush")
        return fsync(descriptor)

    def spied_write(self, *arguments):
        assert not waiting
        events.append("commit")
        return write(self, *arguments)

    monkeypatch.setattr(os, "pwrite", spied_pwrite)
    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Catalogue, "write", spied_write)
    # enough for another shard, so that the folder must be flushed too
    reopen(path).add([f"n{i}" for i in range(100)])
    assert events == ["rows"] * 6 + ["flush"] * 6 + ["folder", "commit"]


def test_a_file_that_was_cut_short_is_named_and_repaired_from_the_texts(path):
    file = path / "generation-000001" / "shard-00001.code.bin"
    os.truncate(file, 100)
    (path / "generation-000001" / "shard-00002.scale.bin").unlink()
    with pytest.raises(IndexDamagedError, match=r"shard-00001.code.bin holds 100 bytes; 5,120"):
        reopen(path)
    index = reopen(path, check_sizes=False)
    report = index.verify()
    assert not report.ok
    assert {Path(damage.file).name for damage in report.damages} == {"shard-00001.code.bin", "shard-00002.scale.bin"}
    with pytest.raises(IndexDamagedError, match=r"shard-0000[12]"):
        index.snapshot()
    with pytest.raises(IndexDamagedError):
        index.add(["x"])
    touched = report.ids
    assert index.repair() == Repair(touched, [])
    assert index.verify().ok
    whole = [entry for entry in ENTRIES if entry.id not in set(touched)]
    check(reopen(path).snapshot(), [*whole, *(entry for entry in ENTRIES if entry.id in set(touched))])


def test_a_flipped_bit_in_an_array_is_found_and_never_given_a_new_checksum(path):
    index = reopen(path)
    index.remove("id 1499")
    flip(path / "generation-000001" / "shard-00000.context.bin", 5000)
    report = index.verify()
    (damage,) = report.damages
    assert damage.file.endswith("shard-00000.context.bin")
    assert "rows 0 to 1,023 of field context" in str(report)
    assert {"id 0", "id 500"} <= set(damage.ids)
    assert "id 600" not in damage.ids
    with pytest.raises(IndexDamagedError, match="nothing was changed"):
        index.compact()
    index.update(["again"], ["id 600"])
    assert index.verify().ids == report.ids
    assert index.repair().lost == []
    assert index.verify().ok
    assert {entry.id: entry.text for entry in index.entries()} == {
        **dict(zip(IDS[:-1], TEXTS[:-1], strict=True)),
        "id 600": "again",
    }


def test_without_texts_repair_lists_damaged_documents_as_lost(tmp_path):
    index = build(tmp_path / "index", TEXTS, IDS, store_text=False)
    flip(next((tmp_path / "index").glob("generation-*/shard-00000.scale.bin")), 4 * 2500)
    assert index.repair().lost == index_ids_of_block(2)
    assert index.verify().ok
    assert len(index) == 1500 - len(index_ids_of_block(2))


def index_ids_of_block(number: int) -> list[str]:
    """Ids of documents with a row in a block of 1,024."""
    _, counts = rows_of(TEXTS)
    ends = np.cumsum(counts)
    starts = ends - counts
    return [
        id for id, start, end in zip(IDS, starts, ends, strict=True) if start // 1024 <= number <= (end - 1) // 1024
    ]


def test_a_changed_text_is_found_and_repair_removes_its_document(path):
    with sqlite3.connect(path / "generation-000001" / "catalogue.sqlite") as connection:
        connection.execute("UPDATE entries SET text = 'forged' WHERE id = 'id 7'")
    index = reopen(path)
    assert index.verify().ids == ["id 7"]
    assert index.repair() == Repair([], ["id 7"])
    assert index.verify().ok
    assert "id 7" not in index


def test_a_missing_entry_is_beyond_repair(path):
    with sqlite3.connect(path / "generation-000001" / "catalogue.sqlite") as connection:
        connection.execute("DELETE FROM entries WHERE id = 'id 7'")
    index = reopen(path)
    assert "1,500 documents were written but 1,499 entries" in str(index.verify())
    with pytest.raises(IndexDamagedError, match="cannot be repaired"):
        index.repair()


def test_a_catalogue_that_is_not_sqlite_is_named(path):
    (path / "generation-000001" / "catalogue.sqlite").write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(IndexDamagedError, match=r"catalogue.sqlite is damaged"):
        reopen(path)
    (path / "generation-000001" / "catalogue.sqlite").unlink()
    with pytest.raises(IndexDamagedError, match=r"catalogue.sqlite is missing"):
        reopen(path)


def test_opening_or_creating_over_something_else_raises(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    for path in (tmp_path / "nothing", tmp_path, file):
        with pytest.raises(IndexStateError, match="is not an index"):
            reopen(path)
    with pytest.raises(IndexStateError, match="is a file"):
        create(file)
    with pytest.raises(IndexStateError, match="holds file"):
        create(tmp_path)
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"kind": "mixencoder-candidate-index", "format": 3, "generation": 1}, IndexStateError, "format 3.*up to 2"),
        ({"kind": "other", "format": 1, "generation": 1}, IndexStateError, 'kind "other"'),
        ({"kind": "mixencoder-candidate-index"}, IndexDamagedError, "cannot be read"),
        ("{", IndexDamagedError, "cannot be read"),
    ],
)
def test_a_pointer_that_this_version_does_not_know_raises(path, content, error, message):
    (path / "index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=message):
        reopen(path)


def test_an_index_can_be_created_where_a_killed_creation_left_files(path):
    create(path.parent / "new").close()
    (path.parent / "new" / "index.json").rename(path.parent / "new" / "index.json.new")
    index = build(path.parent / "new", ["fresh"])
    assert [entry.text for entry in index.entries()] == ["fresh"]
    assert [item.name for item in index.path.glob("generation-*")] == ["generation-000001"]


def test_an_index_whose_pointer_was_lost_is_not_overwritten(path):
    (path / "index.json").unlink()
    with pytest.raises(IndexStateError, match="holds generation-000001"):
        create(path)
    (path / "index.json").write_text('{"kind": "mixencoder-candidate-index", "format": 2, "generation": 1}')
    check(reopen(path).snapshot(), ENTRIES)


def test_a_full_disk_is_named_and_changes_nothing(path, monkeypatch):
    index = reopen(path)
    pwrite = os.pwrite

    def full(descriptor, data, offset):
        if len(data) > 2000:
            return pwrite(descriptor, data[:1000], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(IndexStorageError, match=r"shard-00002.*No space left.*intact"):
        index.add([f"n{i}" for i in range(1000)])
    monkeypatch.undo()
    check(index.snapshot(), ENTRIES)
    # the disk space it took is free again
    assert index.info()["array_bytes"] == 3000 * SCHEMA.row_bytes
    assert index.add(["new"]).added == 1


def test_a_full_disk_within_the_commit_changes_nothing(path):
    index = reopen(path)
    connection = index._newest.store().current().writer()._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(IndexStorageError, match=r"catalogue.sqlite.*full"):
        index.add([f"a long new text, number {i}" for i in range(3000)])
    check(index.snapshot(), ENTRIES)
    connection.execute("PRAGMA max_page_count=1000000")
    assert index.add(["new"]).added == 1
    assert index.verify().ok


def test_a_compaction_without_disk_space_changes_nothing(path):
    index = reopen(path)
    index.remove(IDS[:10])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(IndexStorageError, match="generation-000002"):
            index.compact()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(index.snapshot(), ENTRIES[10:])
    assert [item.name for item in path.glob("generation-*")] == ["generation-000001"]
    index.compact()
    check(index.snapshot(), ENTRIES[10:])


def test_an_interrupt_after_the_commit_does_not_discard_its_rows(path, monkeypatch):
    index = reopen(path)
    transaction = Catalogue.transaction

    def interrupted(self):
        class Interrupting:
            def __enter__(inner):  # noqa: N805
                inner.real = transaction(self)
                return inner.real.__enter__()

            def __exit__(inner, *exception):  # noqa: N805
                inner.real.__exit__(*exception)
                raise KeyboardInterrupt

        return Interrupting()

    monkeypatch.setattr(Catalogue, "transaction", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(["new"], ["new"])
    monkeypatch.undo()
    check(index.snapshot(), [*ENTRIES, Entry("new", "new", None)])
    assert index.verify().ok


def test_an_index_built_in_inference_mode_can_be_added_to_outside_it():
    with torch.inference_mode():
        index = build(None, ["a"])
    index.add(["b"])
    with torch.inference_mode():
        index.add(["c"])
    assert index.verify().ok


def test_a_path_may_hold_characters_that_uris_reserve(tmp_path):
    path = tmp_path / "100% of what? #1 ü"
    build(path, ["a"]).close()
    assert len(reopen(path)) == 1


def test_the_index_needs_no_model_library():
    script = "import sys, mixencoder.index; sys.exit('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_verification_ignores_files_that_a_compaction_deleted(path):
    reader, writer = reopen(path, read_only=True), reopen(path)
    view = reader.snapshot()
    writer.remove(IDS[:3])
    writer.compact()
    assert reader.verify().ok
    check(view, ENTRIES)
