"""A first stage chooses what `rank` scores fully: an exact one gives the prefilter's ranking bit for bit."""

import threading

import numpy as np
import pytest

from mixencoder.errors import InputError
from tests.first_stage.first_stages import KEPT, NAMES, QUERIES, N, Searched, embeddings, long_texts, made


@pytest.fixture(scope="module")
def dual(backbone_path):
    return made(backbone_path)


@pytest.fixture(scope="module")
def index(dual):
    return dual.index(ids=NAMES, embeddings=embeddings())


@pytest.mark.parametrize("layout", ["projected", "compact"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_an_exact_first_stage_is_the_prefilter(dual, layout, precision):
    index = dual.index(ids=NAMES, embeddings=embeddings(), layout=layout, precision=precision)
    stage = Searched(dual, index)
    found = dual.rank(QUERIES, index, 10, first_stage=stage)
    assert found == dual.rank(QUERIES, index, 10) != dual.rank(QUERIES, index, 10, prefilter=None)
    assert stage.calls == [(len(QUERIES), KEPT)]
    assert dual.rank(QUERIES[0], index.snapshot(), 10, first_stage=stage) == found[0]
    for kept in (20, 300):
        assert dual.rank(QUERIES, index, 10, first_stage=stage, prefilter=kept) == dual.rank(
            QUERIES, index, 10, prefilter=kept
        )


@pytest.mark.parametrize(
    "changes",
    [
        # with a negative scale the best by dual score have the least cosines
        {"scale": -0.5},
        {"pooling": "first", "num_context_embeddings": 1},
        {"context_update": False},
        {"query_adapter_size": 8},
        {"dtype": "bfloat16"},
    ],
)
def test_it_is_the_prefilter_for_every_form_of_the_model(backbone_path, changes):
    engine = made(backbone_path, **changes)
    k = engine.config.num_context_embeddings
    index = engine.index(ids=NAMES, embeddings=embeddings(k=k).to(engine.dtype))
    stage = Searched(engine, index)
    assert engine.rank(QUERIES, index, 10, first_stage=stage) == engine.rank(QUERIES, index, 10)
    assert stage.calls


def test_other_options_of_rank_stay(dual, index):
    stage = Searched(dual, index)
    for options in ({"score": "interaction", "prefilter": 50}, {"top_k": None, "prefilter": 50}, {"products": "auto"}):
        options = {"top_k": 10, **options}
        assert dual.rank(QUERIES, index, first_stage=stage, **options) == dual.rank(QUERIES, index, **options)
    halved = dual.rank(QUERIES, index, 10, first_stage=stage, activation_fn=lambda scores: scores / 2)
    plain = dual.rank(QUERIES, index, 10, first_stage=stage)
    assert [entry["score"] * 2 for entry in halved[0]] == [entry["score"] for entry in plain[0]]


def test_few_documents_are_all_scored_without_a_search(dual):
    index = dual.index(ids=NAMES[:200], embeddings=embeddings(200))
    stage = Searched(dual, index)
    whole = dual.rank(QUERIES, index, 10, prefilter=None)
    assert dual.rank(QUERIES, index, 10, first_stage=stage) == whole
    assert dual.rank(QUERIES, index, 10, first_stage=stage, prefilter=200) == whole
    assert dual.rank(QUERIES, index, 10, first_stage=stage, prefilter=10**9) == whole
    assert not stage.calls


def test_missing_negative_and_repeated_positions_are_left_out(dual, index):
    whole = [{entry["corpus_id"]: entry for entry in ranking} for ranking in dual.rank(QUERIES, index)]

    def some_missing(found):
        found[:, 1::2] = -1
        found[1] = -1
        return found

    found = dual.rank(QUERIES, index, 10, first_stage=Searched(dual, index, some_missing))
    assert [len(ranking) for ranking in found] == [10, 0, 10]
    for ranking, scored in zip(found, whole, strict=True):
        assert all(entry == scored[entry["corpus_id"]] for entry in ranking)
    few = Searched(dual, index, lambda found: [[5, 3, 5], [], np.array([7])])
    found = dual.rank(QUERIES, index, 10, first_stage=few)
    assert [sorted(entry["corpus_id"] for entry in ranking) for ranking in found] == [[3, 5], [], [7]]
    assert [entry["score"] for entry in found[2]] == [whole[2][7]["score"]]
    texts = dual.index([f"rice {name}" for name in NAMES], NAMES)
    assert dual.rank(QUERIES, texts, 5, first_stage=few, return_documents=True)[2][0]["text"] == "rice id7"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1, 2]], "returned 1 rows for 3 queries; expected one row per query"),
        ([[1.5]] * 3, r"shape \(1,\) and dtype float64 for a query; expected a row of integers"),
        ([[[1]]] * 3, r"shape \(1, 1\)"),
        ([[0, N]] * 3, f"returned the position {N}; expected positions below {N}"),
    ],
)
def test_other_results_are_errors(dual, index, result, message):
    with pytest.raises(InputError, match=message):
        dual.rank(QUERIES, index, 10, first_stage=Searched(dual, index, lambda found: result))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_stage": "auto"}, r"first_stage is 'auto' \(str\); expected an object with a method"),
        ({"prefilter": None}, 'prefilter is None, which scores all documents; with first_stage expected "auto"'),
        ({"top_k": None}, 'prefilter is "auto" with top_k None'),
        ({"score": "dual"}, 'and score "dual", for which it scores all documents'),
        ({"ids": NAMES[:3]}, "ids and first_stage are both given"),
        ({"documents": ["a text"]}, "first_stage is for an index"),
    ],
)
def test_options_that_contradict_it_are_errors(dual, index, options, message):
    options = {"documents": index, "top_k": 10, "first_stage": Searched(dual, index), **options}
    with pytest.raises(InputError, match=message):
        dual.rank(QUERIES, **options)


def test_a_model_without_a_dual_term_has_none(backbone_path, dual, index):
    published = made(backbone_path, dual_term=False)
    own = published.index(ids=NAMES, embeddings=embeddings())
    for call in (
        lambda: published.rank(QUERIES, own, 10, first_stage=Searched(dual, index)),
        lambda: published.build_first_stage(own),
        lambda: published.open_first_stage(own),
        lambda: published.dual_vectors(own),
    ):
        with pytest.raises(InputError, match=r"dual term.*\(dual_term=False\)"):
            call()


def test_vectors_of_documents_with_several_rows(dual):
    index = dual.index(long_texts(), NAMES, on_overflow="chunk")
    view = index.snapshot()
    assert view.rows > len(view)
    stage = Searched(dual, index)
    assert stage.positions.tolist() == [position for chunk in view.chunks(100) for position in chunk.positions]
    # repeated positions collapse, so fewer documents than wanted may be scored
    found = dual.rank(QUERIES, index, 10, first_stage=stage)
    scores = [{entry["id"]: entry["score"] for entry in ranking} for ranking in dual.rank(QUERIES, index)]
    for ranking, scored in zip(found, scores, strict=True):
        assert len({entry["id"] for entry in ranking}) == 10
        assert all(entry["score"] == scored[entry["id"]] for entry in ranking)


def test_threads_share_one(dual, index):
    stage = Searched(dual, index)
    expected, found = dual.rank(QUERIES, index, 10), []
    workers = [
        threading.Thread(target=lambda: found.append(dual.rank(QUERIES, index, 10, first_stage=stage)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 4
