"""A vector index in a folder serves one commit of one index; here the library is NumPy, so that none is needed."""

import json
import os
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from mixencoder.cli import app
from mixencoder.errors import (
    IndexDamagedError,
    IndexMismatchError,
    IndexStateError,
    IndexStorageError,
    InputError,
    MissingExtraError,
)
from mixencoder.first_stage import VectorIndex
from mixencoder.first_stage.libraries import LIBRARIES, Options
from mixencoder.first_stage.vector_index import FOLDER, RECORD, VECTORS
from mixencoder.index import CandidateIndex, Field, Schema
from mixencoder.ranking.dual_vectors import pooled
from tests.first_stage.first_stages import KEPT, NAMES, QUERIES, ExactLibrary, N, embeddings, long_texts, made

AGAIN = r"Build it again: mixencoder index first-stage INDEX, or model.build_first_stage\(index\)"


@pytest.fixture(autouse=True)
def exact_library(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "exact", ExactLibrary)


@pytest.fixture(scope="module")
def dual(backbone_path):
    return made(backbone_path)


@pytest.fixture
def index(dual, tmp_path):
    with dual.index(ids=NAMES, embeddings=embeddings(), path=tmp_path / "index", store_text=False) as made_index:
        yield made_index


def test_it_lies_in_the_index_and_disturbs_nothing_there(dual, index, tmp_path):
    built = dual.build_first_stage(index, kind="exact")
    assert built.path == index.path / FOLDER
    opened = dual.open_first_stage(index)
    expected = dual.rank(QUERIES, index, 10)
    assert expected == dual.rank(QUERIES, index, 10, first_stage=built)
    assert expected == dual.rank(QUERIES, index, 10, first_stage=opened)
    assert opened.info() == built.info()
    assert (opened.info()["documents"], opened.info()["dimension"]) == (N, 32)
    assert index.verify().ok
    assert index.compact() == 0
    # the rows are the same ones
    assert dual.rank(QUERIES, index, 10, first_stage=dual.open_first_stage(index)) == expected
    shutil.copytree(index.path, tmp_path / "copy")
    with dual.open_index(tmp_path / "copy") as copy:
        assert dual.rank(QUERIES, copy, 10, first_stage=dual.open_first_stage(copy)) == expected
    assert sorted(path.name for path in (index.path / FOLDER).iterdir()) == [RECORD, VECTORS]


def test_after_each_change_it_is_out_of_date(dual, index):
    stage = dual.build_first_stage(index, kind="exact")

    def add():
        index.add(ids=["new"], embeddings=embeddings(1, seed=1))

    changes = [lambda: index.remove("id3"), add, lambda: index.remove("new"), index.compact]
    changes += [lambda: index.update(ids=["id5"], embeddings=embeddings(1, seed=2))]
    for change in changes:
        change()
        found = f"out of date: it was built of {stage.built.documents} documents at commit [0-9a-f]{{8}}; expected the "
        found += rf"{len(index)} documents at commit [0-9a-f]{{8}} of this index. {AGAIN}"
        with pytest.raises(IndexMismatchError, match=found):
            dual.rank(QUERIES, index, 10, first_stage=stage)
        with pytest.raises(IndexMismatchError, match=found):
            dual.open_first_stage(index)
        stage = dual.build_first_stage(index, kind="exact")
        assert dual.rank(QUERIES, index, 10, first_stage=stage) == dual.rank(QUERIES, index, 10)
        assert dual.rank(QUERIES, index, 10, first_stage=dual.open_first_stage(index))


def test_removing_adding_and_compacting_to_the_same_number_is_noticed(dual, index):
    stage = dual.build_first_stage(index, kind="exact")
    index.remove("id0")
    index.add(ids=["id0"], embeddings=embeddings()[:1])
    index.compact()
    assert (len(index), index.snapshot().removed_rows) == (N, 0)
    with pytest.raises(IndexMismatchError, match="out of date"):
        dual.rank(QUERIES, index, 10, first_stage=stage)


def test_a_snapshot_keeps_its_first_stage(dual, index):
    stage, view = dual.build_first_stage(index, kind="exact"), index.snapshot()
    expected = dual.rank(QUERIES, view, 10)
    index.remove("id3")
    assert dual.rank(QUERIES, view, 10, first_stage=stage) == expected
    assert dual.build_first_stage(view, kind="exact").path is None


def test_that_of_another_index_is_an_error(backbone_path, dual, index, tmp_path):
    stage = dual.build_first_stage(index, kind="exact")
    narrow = made(backbone_path, dtype="bfloat16")
    own = narrow.index(ids=NAMES, embeddings=embeddings().bfloat16())
    with pytest.raises(IndexMismatchError, match=f"made by MixEncoder.*dtype is float32, expected bfloat16. {AGAIN}"):
        narrow.rank(QUERIES, own, 10, first_stage=stage)
    other = made(backbone_path, seed=5)
    own = other.index(ids=NAMES, embeddings=embeddings())
    with pytest.raises(IndexMismatchError, match=r"encoder is \w+, expected \w+"):
        other.open_first_stage(own, index.path / FOLDER)
    # the model is compared with the index first
    with pytest.raises(IndexMismatchError, match="the index was made by"):
        narrow.build_first_stage(index, kind="exact")


def test_a_model_with_another_interaction_shares_it(backbone_path, dual, index):
    stage = dual.build_first_stage(index, kind="exact")
    other = made(backbone_path)
    with torch.no_grad():
        for parameter in other.model.interaction.parameters():
            parameter.mul_(1.1)
    found = other.rank(QUERIES, index, 10, first_stage=stage)
    assert found == other.rank(QUERIES, index, 10) != dual.rank(QUERIES, index, 10)


def test_documents_of_several_rows_are_found_until_there_are_enough(dual):
    index = dual.index(long_texts(), NAMES, on_overflow="chunk")
    index.remove(NAMES[3:30])
    assert index.snapshot().rows > len(index)
    stage = dual.build_first_stage(index, kind="exact")
    for kept in (1, KEPT, len(index) - 1):
        found = dual.rank(QUERIES, index, 10, first_stage=stage, prefilter=kept)
        assert found == dual.rank(QUERIES, index, 10, prefilter=kept)
    vectors = next(dual.dual_vectors(index)).vectors[:2]
    for count in (1, 50, N, 10**6):
        rows = stage.search(vectors, count)
        assert [len(row) for row in rows] == [len(set(row.tolist())) for row in rows] == [min(count, len(index))] * 2


def test_shards_have_one_in_their_folder(dual, tmp_path):
    for number, part in enumerate((slice(0, 300), slice(300, 301), slice(301, N))):
        dual.index(ids=NAMES[part], embeddings=embeddings()[part], path=tmp_path / f"s/{number}").close()
    with dual.open_index(tmp_path / "s") as index:
        expected = dual.rank(QUERIES, index, 10)
        stage = dual.build_first_stage(index, kind="exact")
        assert stage.path == tmp_path / "s" / FOLDER
    with dual.open_index(tmp_path / "s") as index:
        assert len(index.shards) == 3
        assert dual.rank(QUERIES, index, 10, first_stage=dual.open_first_stage(index)) == expected
    shards = [tmp_path / "s" / str(number) for number in range(3)]
    with dual.open_index(shards) as index:
        assert dual.rank(QUERIES, index, 10, first_stage=stage) == expected
        assert dual.build_first_stage(index, kind="exact").path is None
        with pytest.raises(InputError, match="path is None, but the index has no folder"):
            dual.open_first_stage(index)
        assert dual.open_first_stage(index, tmp_path / "s" / FOLDER).search(stage_vectors(dual, index), 2)
    # the same documents in another order
    with dual.open_index(shards[::-1]) as index, pytest.raises(IndexMismatchError, match="out of date"):
        dual.rank(QUERIES, index, 10, first_stage=stage)
    with dual.open_index(shards[0]) as index:
        index.remove("id7")
    with dual.open_index(tmp_path / "s") as index, pytest.raises(IndexMismatchError, match="out of date"):
        dual.open_first_stage(index)


def stage_vectors(engine, index):
    return next(engine.dual_vectors(index)).vectors[:3]


def test_vectors_of_another_width_are_an_error(dual, index):
    stage = dual.build_first_stage(index, kind="exact")
    with pytest.raises(InputError, match=r"vectors are \(3, 31\); expected \(queries, 32\)"):
        stage.search(stage_vectors(dual, index)[:, 1:], 5)
    with pytest.raises(InputError, match="count is 0"):
        stage.search(stage_vectors(dual, index), 0)


def test_damage_is_an_error(dual, index):
    dual.build_first_stage(index, kind="exact")
    folder = index.path / FOLDER
    good = {name: (folder / name).read_bytes() for name in (RECORD, VECTORS)}

    def content(**changes):
        return json.dumps({**json.loads(good[RECORD]), **changes}).encode()

    flipped = bytearray(good[VECTORS])
    flipped[-9] ^= 1
    short = len(good[VECTORS]) - 5
    damages = [
        (VECTORS, good[VECTORS][:-5], f"has {short:,} bytes; expected {short + 5:,}. {AGAIN}"),
        (VECTORS, bytes(flipped), rf"is not what was written \(checksum\). {AGAIN}"),
        (VECTORS, None, f"is missing. {AGAIN}"),
        (RECORD, b"{", f"first_stage.json cannot be read .*{AGAIN}"),
        (RECORD, content(kind="x"), "kind 'x'"),
        (RECORD, content(rows="5"), "cannot be read"),
        (RECORD, content(library=["exact"]), "cannot be read"),
        (RECORD, content(options={"x": 1}), "cannot be read"),
        (RECORD, content(more=1), "cannot be read"),
        (RECORD, b"[" * 10**5, "cannot be read"),
        (RECORD, b" " * 2**21, "cannot be read"),
        (RECORD, content(dimension=31), rf"holds {N} vectors of width 32; expected {N} of width 31. {AGAIN}"),
    ]
    for name, damaged, message in damages:
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        with pytest.raises(IndexDamagedError, match=message):
            dual.open_first_stage(index)
        (folder / name).write_bytes(good[name])
    dual.open_first_stage(index)
    (folder / RECORD).write_bytes(content(format=2))
    with pytest.raises(IndexStateError, match="has format 2; this version of mixencoder reads up to 1"):
        dual.open_first_stage(index)
    # without verify the checksum is not compared
    (folder / RECORD).write_bytes(content(crc32=5))
    assert dual.open_first_stage(index, verify=False).search(stage_vectors(dual, index), 5)
    (folder / RECORD).unlink()
    with pytest.raises(IndexStateError, match=r"holds no first stage\. Build one: mixencoder index first-stage INDEX"):
        dual.open_first_stage(index)
    (folder / RECORD).symlink_to("/etc/hostname")
    with pytest.raises(IndexDamagedError, match="is a symbolic link"):
        dual.open_first_stage(index)


def test_without_one_the_error_says_how_to_build_it(dual, index):
    for path in (None, index.path / "other"):
        with pytest.raises(IndexStateError, match=r"holds no first stage\. Build one"):
            dual.open_first_stage(index, path)


def test_a_crash_leaves_the_old_one(dual, index, monkeypatch):
    dual.build_first_stage(index, kind="exact")
    expected = dual.rank(QUERIES, index, 10)

    def full(self, path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExactLibrary, "save", full)
    with pytest.raises(IndexStorageError, match="cannot be written: No space left on device"):
        dual.build_first_stage(index, kind="exact")
    assert dual.rank(QUERIES, index, 10, first_stage=dual.open_first_stage(index)) == expected
    assert sorted(path.name for path in (index.path / FOLDER).iterdir()) == [RECORD, VECTORS]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(dual, index, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(IndexStorageError, match="cannot be written"):
        dual.build_first_stage(index, tmp_path / "x", kind="exact")
    tmp_path.chmod(0o700)


def test_options_are_checked(dual, index):
    with pytest.raises(InputError, match="kind is 'annoy'; expected one of usearch, faiss, exact"):
        dual.build_first_stage(index, kind="annoy")
    with pytest.raises(InputError, match="effort is 0"):
        dual.build_first_stage(index, kind="exact", effort=0)
    index.remove(NAMES)
    with pytest.raises(InputError, match="the index holds no document"):
        dual.build_first_stage(index, kind="exact")


@pytest.mark.parametrize("kind", ["usearch", "faiss"])
def test_a_missing_extra_is_named(dual, index, kind, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(MissingExtraError, match=rf"needs the extra: pip install 'mixencoder\[{kind}\]'"):
        dual.build_first_stage(index, kind=kind)


def test_an_index_of_something_else_has_no_vectors():
    schema = Schema((Field("scale", (), "float32"),))
    with CandidateIndex.create(None, schema, {}, project=lambda rows: {"scale": rows[:, 0, 0]}) as index:
        index.build(embeddings=embeddings(3), ids=["a", "b", "c"])
        with pytest.raises(IndexMismatchError, match="has the fields scale; expected context embeddings"):
            VectorIndex.build(index.snapshot(), pooled, "exact", Options())


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_commands(dual, index, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    command = ["rank", QUERIES[0], "--index", index.path, "--top-k", 10, "--json", "--model", tmp_path / "model"]

    def found(*more):
        result = run(*command, *more)
        assert result.exit_code == 0, result.output
        return [entry["id"] for entry in json.loads(result.stdout)]

    result = run(*command, "--first-stage", "auto")
    assert result.exit_code == 2
    assert "holds no first stage. Build one: mixencoder index first-stage INDEX" in result.output
    result = run("index", "first-stage", index.path, "--kind", "exact")
    assert result.exit_code == 0, result.output
    assert f"{index.path / FOLDER} holds 700 vectors of 700 candidates" in result.output
    assert found("--first-stage", "auto") == found() == found("--first-stage", index.path / FOLDER)
    assert found("--first-stage", "auto", "--prefilter", 20) == found("--prefilter", 20)
    for more, message in (
        (["--prefilter", "all"], "prefilter is None"),
        (["--first-stage", tmp_path / "none"], "holds no first stage"),
    ):
        result = run(*command, "--first-stage", "auto", *more)
        assert result.exit_code == 2
        assert message in result.output
    index.remove("id3")
    assert "out of date" in run(*command, "--first-stage", "auto").output
    assert run("index", "first-stage", index.path, "--kind", "exact", "--output", tmp_path / "it").exit_code == 0
    assert found("--first-stage", tmp_path / "it") == found()


def test_one_command_builds_both(backbone_path, dual, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("".join(f"rice {name}\n" for name in NAMES))
    build = ["index", "build", tmp_path / "index", "--candidates", tmp_path / "texts.txt"]
    result = run(*build, "--model", tmp_path / "model", "--first-stage", "annoy")
    assert result.exit_code == 2
    assert "kind is 'annoy'" in result.output
    assert not (tmp_path / "index").exists()
    result = run(*build, "--model", tmp_path / "model", "--first-stage", "exact")
    assert result.exit_code == 0, result.output
    with dual.open_index(tmp_path / "index") as index:
        assert dual.open_first_stage(index).built.documents == len(index)
    result = run("rank", "rice", "--candidates", tmp_path / "texts.txt", "--first-stage", "auto")
    assert "--first-stage is for an index" in result.output
    made_without = tmp_path / "published"
    made(backbone_path, dual_term=False).save_pretrained(made_without)
    result = run(*build[:2], tmp_path / "other", *build[3:], "--model", made_without, "--first-stage", "exact")
    assert "this model has none" in result.output
