"""The default prefilter: its rule, and that `rank` over an index returns what the number that it chooses returns."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app
from mixencoder.errors import InputError
from mixencoder.ranking.prefilter import check_prefilter, chosen_prefilter

N = 700
QUERIES = ["how to cook rice", "undo the git commit", "paris"]
NAMES = [f"id{number}" for number in range(N)]
KEPT = 128
"""What "auto" chooses for ten results."""


def embeddings(count=N):
    return torch.randn(count, 2, 32, generator=torch.Generator().manual_seed(0))


def made(path, dual_term):
    torch.manual_seed(0)
    # a small dual term, so that the best by dual score are not the best by full score
    return MixEncoder.from_backbone(path, num_context_embeddings=2, dual_term=dual_term, dual_scale_init=0.5)


@pytest.fixture(scope="module")
def dual(backbone_path):
    return made(backbone_path, True)


@pytest.fixture(scope="module")
def index(dual):
    return dual.index(ids=NAMES, embeddings=embeddings())


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, 128), (10, 128), (12, 128), (13, 160), (16, 160), (17, 192), (100, 1024), (1000, 10_016)]
)
def test_auto_keeps_ten_per_result_of_more_than_four_times_as_many(top_k, kept):
    def chosen(documents):
        return chosen_prefilter("auto", documents, top_k, has_dual=True)

    assert kept >= max(100, 10 * top_k)
    assert kept % 32 == 0
    assert [chosen(documents) for documents in (0, 1, kept, 4 * kept)] == [None] * 4
    assert [chosen(documents) for documents in (4 * kept + 1, 10**9)] == [kept] * 2


def test_auto_keeps_all_if_all_are_wanted_or_nothing_can_be_prefiltered():
    many = 10**6
    assert chosen_prefilter("auto", many, 10, has_dual=True) == KEPT
    assert chosen_prefilter("auto", many, None, has_dual=True) is None
    assert chosen_prefilter("auto", many, 10, has_dual=False) is None
    for score in ("dual", "interaction"):
        assert chosen_prefilter("auto", many, 10, score=score, has_dual=True) is None


@pytest.mark.parametrize("given", [None, 1, 10**6])
def test_a_given_prefilter_stays(given):
    for top_k, documents in ((None, 5), (3, 10**6)):
        assert chosen_prefilter(given, documents, top_k, score="dual", has_dual=False) == given


@pytest.mark.parametrize("wrong", ["x", "AUTO", "", "5", 0, -1, True, 2.0, [3], b"auto"])
def test_other_values_are_refused(dual, index, wrong):
    message = 'prefilter is .*; expected a positive integer, "auto" or None'
    calls = [lambda: check_prefilter(wrong), lambda: dual.rank(QUERIES[0], index, 3, prefilter=wrong)]
    for call in [*calls, lambda: dual.rank(QUERIES[0], ["a"], prefilter=wrong)]:
        with pytest.raises(InputError, match=message):
            call()


def test_the_default_over_an_index_is_what_its_number_gives(dual, index):
    found = dual.rank(QUERIES, index, 10)
    assert found == dual.rank(QUERIES, index, 10, prefilter=KEPT)
    assert found == dual.rank(QUERIES, index, np.int64(10), prefilter="auto")
    assert found == [dual.rank(query, index, 10) for query in QUERIES]
    assert found == dual.rank(QUERIES, index.snapshot(), 10)
    everything = dual.rank(QUERIES, index, 10, prefilter=None)
    # otherwise this test shows nothing
    assert found != everything
    for ranking, whole in zip(found, dual.rank(QUERIES, index), strict=True):
        assert len(ranking) == 10
        # the scores that are returned are those of a ranking of all, bit for bit
        scores = {entry["id"]: entry["score"] for entry in whole}
        assert all(entry["score"] == scores[entry["id"]] for entry in ranking)


def test_none_scores_all(dual, index):
    whole = dual.rank(QUERIES[0], index, prefilter=None)
    assert len(whole) == N
    assert dual.rank(QUERIES[0], index, 10, prefilter=None) == whole[:10]


def test_by_default_all_are_scored_where_all_are_wanted_or_few_are_there(dual, index):
    assert dual.rank(QUERIES[0], index) == dual.rank(QUERIES[0], index, prefilter=None)
    # 200 results take the best 2,000
    assert dual.rank(QUERIES[0], index, 200) == dual.rank(QUERIES[0], index, prefilter=None)[:200]
    for score in ("dual", "interaction"):
        whole = dual.rank(QUERIES[0], index, prefilter=None, score=score)
        assert dual.rank(QUERIES[0], index, 10, score=score) == whole[:10]


def test_a_model_without_a_dual_term_scores_all(backbone_path):
    published = made(backbone_path, False)
    index = published.index(embeddings=embeddings())
    assert published.rank(QUERIES[0], index, 10) == published.rank(QUERIES[0], index)[:10]
    with pytest.raises(InputError, match="prefilter ranks by the dual score, but this model has no dual term"):
        published.rank(QUERIES[0], index, 10, prefilter=KEPT)


def test_the_number_of_named_documents_counts(dual, index):
    few, many = NAMES[: 4 * KEPT], NAMES[: 4 * KEPT + 1]
    for query in QUERIES:
        whole = [dual.rank(query, index, 10, ids=ids, prefilter=None) for ids in (few, many)]
        kept = [dual.rank(query, index, 10, ids=ids, prefilter=KEPT) for ids in (few, many)]
        assert [dual.rank(query, index, 10, ids=ids) for ids in (few, many)] == [whole[0], kept[1]]
    assert whole[0] != kept[0]
    assert whole[1] != kept[1]
    # a list for each query, each with a number of its own
    assert dual.rank([query, query], index, 10, ids=[few, many]) == [whole[0], kept[1]]


def test_documents_that_are_left_count(dual):
    index = dual.index(ids=NAMES[: 4 * KEPT + 1], embeddings=embeddings(4 * KEPT + 1))
    ways = [{"prefilter": KEPT}, {"prefilter": None}]
    kept, _ = (dual.rank(QUERIES[0], index, 10, **options) for options in ways)
    assert dual.rank(QUERIES[0], index, 10) == kept
    index.remove(NAMES[:1])
    kept, whole = (dual.rank(QUERIES[0], index, 10, **options) for options in ways)
    assert kept != whole
    assert dual.rank(QUERIES[0], index, 10) == whole


def test_documents_count_not_their_parts(dual):
    texts = [" ".join(["the", "cat", "sat"] * 14 + ["mat"] * (number % 7)) for number in range(300)]
    index = dual.index(texts, NAMES[:300], on_overflow="chunk")
    assert index.snapshot().rows > 4 * KEPT > len(index)
    assert dual.rank(QUERIES[0], index, 10) == dual.rank(QUERIES[0], index, 10, prefilter=None)


def test_over_texts_and_tensors_auto_means_nothing(dual):
    for documents in (["rice in a pot", "the mat"], embeddings(600)):
        plain = dual.rank(QUERIES[0], documents, 10)
        assert dual.rank(QUERIES[0], documents, 10, prefilter="auto") == plain
        assert dual.rank(QUERIES[0], documents, 10, prefilter=None) == plain
        assert plain == dual.rank(QUERIES[0], documents)[:10]
        with pytest.raises(InputError, match="prefilter and products are for an index"):
            dual.rank(QUERIES[0], documents, 10, prefilter=5)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_prefilters_by_default(dual, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    dual.index(ids=NAMES, embeddings=embeddings(), path=tmp_path / "index", store_text=False).close()
    command = [
        "rank",
        QUERIES[0],
        "--index",
        tmp_path / "index",
        "--top-k",
        10,
        "--json",
        "--model",
        tmp_path / "model",
    ]

    def found(*more):
        result = run(*command, *more)
        assert result.exit_code == 0, result.output
        return [entry["id"] for entry in json.loads(result.stdout)]

    with dual.open_index(tmp_path / "index") as index:
        kept, whole = (
            [entry["id"] for entry in dual.rank(QUERIES[0], index, 10, prefilter=way)] for way in (KEPT, None)
        )
    assert kept != whole
    assert found() == found("--prefilter", "auto") == found("--prefilter", KEPT) == kept
    assert found("--prefilter", "all") == whole
    for wrong in ("0", "-1", "some", "²", "1.5"):
        result = run(*command, f"--prefilter={wrong}")
        assert result.exit_code == 2
        assert f"--prefilter is '{wrong}'; expected auto, all or a positive integer" in result.output
