"""First stages by FAISS and usearch; skipped where they are not installed."""

import re
import threading
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from mixencoder.errors import IndexDamagedError, InputError
from mixencoder.first_stage.libraries import LIBRARIES, Options
from tests.first_stage.first_stages import KEPT, NAMES, QUERIES, N, embeddings, long_texts, made

WAYS = [
    ("faiss", {"factory": "Flat"}),
    ("faiss", {}),
    ("faiss", {"factory": "IVF4,Flat", "effort": 4}),
    ("faiss", {"factory": "IDMap,HNSW16", "effort": 2000}),
    ("usearch", {"precision": "float32", "effort": 2000}),
]
"""All of these find the exact best of so few documents."""


@pytest.fixture(scope="module")
def dual(backbone_path):
    return made(backbone_path)


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_it_is_the_prefilter_where_it_is_exact(dual, kind, options, tmp_path):
    pytest.importorskip(kind)
    with dual.index(ids=NAMES, embeddings=embeddings(), path=tmp_path / "index") as index:
        index.remove(NAMES[5:9])
        expected = dual.rank(QUERIES, index, 10)
        assert (
            dual.rank(QUERIES, index, 10, first_stage=dual.build_first_stage(index, kind=kind, **options)) == expected
        )
        stage = dual.open_first_stage(index)
        assert dual.rank(QUERIES, index, 10, first_stage=stage) == expected
        assert [dual.rank(query, index, 10, first_stage=stage) for query in QUERIES] == expected
        # a new one replaces it while it is open
        index.add(ids=["new"], embeddings=embeddings(1, seed=3))
        newer = dual.build_first_stage(index, kind=kind, **options)
        assert dual.rank(QUERIES, index, 10, first_stage=newer) == dual.rank(QUERIES, index, 10)
        assert len(stage.search(next(dual.dual_vectors(index)).vectors[:3], 5)[0]) == 5


def test_the_lines_of_the_page_run(dual, tmp_path):
    pytest.importorskip("usearch")
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^    model\.build_first_stage\(.*\n(?:    .*\n)*", page, flags=re.M)
    with dual.index(ids=NAMES, embeddings=embeddings(), path=tmp_path / "index") as index:
        names = {"model": dual, "index": index}
        exec(compile(dedent(lines), "docs/scale.md", "exec"), names)
        assert names["stage"].built.documents == N


@pytest.mark.parametrize(("kind", "options"), [*WAYS, ("usearch", {}), ("usearch", {"precision": "bfloat16"})])
def test_documents_of_several_rows(dual, kind, options):
    pytest.importorskip(kind)
    index = dual.index(long_texts(), NAMES, on_overflow="chunk")
    index.remove(NAMES[3:30])
    stage = dual.build_first_stage(index, kind=kind, **options)
    vectors = next(dual.dual_vectors(index)).vectors[:4]
    for count in (1, KEPT):
        for row in stage.search(vectors, count):
            assert len(row) == len(set(row.tolist()))
            assert count * 0.9 <= len(row) <= count
    scores = [{entry["id"]: entry["score"] for entry in ranking} for ranking in dual.rank(QUERIES, index)]
    for ranking, scored in zip(dual.rank(QUERIES, index, 10, first_stage=stage), scores, strict=True):
        assert len(ranking) == 10
        assert all(entry["score"] == scored[entry["id"]] for entry in ranking)


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_more_than_there_are_is_all_of_them(kind):
    pytest.importorskip(kind)
    made = LIBRARIES[kind].make(Options(), 8, repeats=False)
    assert made.search(np.ones((2, 8), np.float32), 3).tolist() == [[-1] * 3] * 2
    vectors = np.eye(8, dtype=np.float32)[:5]
    made.add(np.arange(5), vectors)
    found = made.search(vectors[:2], 9)
    assert (found.shape, found.dtype) == ((2, 9), np.int64)
    assert found[:, 0].tolist() == [0, 1]
    assert [sorted(row) for row in found.tolist()] == [[-1] * 4 + [0, 1, 2, 3, 4]] * 2
    assert made.search(vectors[:1], 2).shape == (1, 2)
    assert made.size() == (5, 8)


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_the_effort_is_kept_in_the_file(kind, tmp_path):
    pytest.importorskip(kind)
    options = Options(effort=77)
    made = LIBRARIES[kind].make(options, 8, repeats=True)
    made.add(np.array([0, 0, 1]), np.eye(8, dtype=np.float32)[:3])
    made.save(tmp_path / "file")
    loaded = LIBRARIES[kind].load(tmp_path / "file", options)
    held = loaded._index
    if kind == "usearch":
        assert held.expansion_search == 77
    else:
        import faiss

        assert faiss.downcast_index(held.index).hnsw.efSearch == 77
    assert sorted(loaded.search(np.ones((1, 8), np.float32), 5)[0].tolist()) == [-1, -1, 0, 0, 1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("faiss", {"factory": "Nonsense"}, "factory is 'Nonsense', which FAISS cannot make"),
        ("faiss", {"precision": "float16"}, 'name it in factory, such as "HNSW32,SQfp16"'),
        ("faiss", {"factory": "Flat", "effort": 5}, "Flat has neither a graph nor inverted lists"),
        ("faiss", {"factory": "IVF4096,Flat"}, r"FAISS cannot train this index on 700 vectors: .*fewer lists"),
        ("usearch", {"factory": "HNSW32"}, "factory is 'HNSW32', which is for FAISS"),
        ("usearch", {"precision": "int4"}, "precision is 'int4'; expected one of float32, float16, bfloat16"),
    ],
)
def test_options_that_a_library_cannot_use_are_errors(dual, kind, options, message):
    pytest.importorskip(kind)
    index = dual.index(ids=NAMES, embeddings=embeddings())
    with pytest.raises(InputError, match=message):
        dual.build_first_stage(index, kind=kind, **options)


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_a_file_that_is_no_index_is_an_error(kind, tmp_path):
    pytest.importorskip(kind)
    (tmp_path / "file").write_bytes(b"no index" * 100)
    with pytest.raises(IndexDamagedError, match="cannot read"):
        LIBRARIES[kind].load(tmp_path / "file", Options())


@pytest.mark.parametrize(("kind", "options"), [("faiss", {}), ("usearch", {})])
def test_threads_share_one(dual, kind, options):
    pytest.importorskip(kind)
    index = dual.index(ids=NAMES, embeddings=embeddings())
    stage = dual.build_first_stage(index, kind=kind, **options)
    expected, found = dual.rank(QUERIES, index, 10, first_stage=stage), []

    def work():
        found.extend(dual.rank(QUERIES, index, 10, first_stage=stage) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 20
