"""The best candidates: ties, ids, streamed chunks and NaN, on every backend."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkernels import score_candidates
from mixkernels.packed_keys import best_of, pack_keys, unpack_keys
from tests.kernels.attention_cases import BACKENDS
from tests.kernels.layer_cases import parameters, randn, run, scoring_rows


def test_the_best_are_those_of_all_scores(backend):
    rows = scoring_rows(n=100, k=1, d=16)
    scores = run(score_candidates, backend, *rows)
    for top_k in (1, 10, 40, 1000):
        best = run(score_candidates, backend, *rows, top_k=top_k, first_id=50)
        expected = scores.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(best.scores, expected.values[:, :top_k])
        assert torch.equal(best.ids, expected.indices[:, :top_k] + 50)


FEW = st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, -2.5, math.inf, -math.inf, 1e-40, 3e38])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scores=st.lists(FEW, min_size=1, max_size=90),
    top_k=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 90), max_size=3),
    first=st.sampled_from([0, 7, 2**31 - 3, 2**32 - 90]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_chunks_rank_as_one_sort_with_ties_to_the_lower_id(backend, scores, top_k, cuts, first):
    # with weight and bias zero the additive score is all there is
    d, scores = 4, torch.tensor(scores).tolist()
    zero = torch.zeros(d)
    edges = sorted({0, len(scores), *(cut for cut in cuts if cut < len(scores))})
    best = None
    for start, stop in itertools.pairwise(edges):
        rows = [randn(stop - start, 1, d), randn(stop - start, 1, d), randn(stop - start, d), randn(stop - start, d)]
        best = run(
            score_candidates,
            backend,
            *rows,
            zero,
            zero,
            additive=torch.tensor(scores[start:stop]),
            top_k=top_k,
            running=best,
            first_id=first + start,
        )
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:top_k]
    assert best.ids.tolist() == [first + index for index in expected]
    assert best.scores.tolist() == [scores[index] for index in expected]


def test_many_candidates_are_ranked_over_long_runs(backend, monkeypatch):
    count = 150
    if backend == "triton":
        from mixkernels.layer import triton_scoring as scoring

        monkeypatch.setattr(scoring, "_LONG_RUNS_FROM", 2 * count)
        assert count < 2 * scoring.run_length(2 * count), "the last run should not be full"
        assert scoring.run_length(2 * count) > scoring.run_length(2 * count - 1)
    rows = [torch.ones(2, count, 1, 2), torch.zeros(1, 2), torch.ones(2, count, 2), torch.zeros(2)]
    additive = (torch.arange(count) * 7919 % 50).float()
    best = run(score_candidates, backend, *rows, torch.zeros(2), torch.zeros(2), additive=additive, top_k=130)
    expected = additive.sort(descending=True, stable=True)
    assert torch.equal(best.ids, expected.indices[:130].expand(2, 130))
    assert torch.equal(best.scores, expected.values[:130].expand(2, 130))


def test_a_nan_score_comes_first_and_stays_nan(backend):
    rows = [tensor[0] for tensor in scoring_rows(n=40)[:4]]
    additive = torch.zeros(40)
    additive[[30, 12]] = torch.tensor([math.nan, -math.nan])
    additive[5] = math.inf
    best = run(score_candidates, backend, *rows, *parameters(48), additive=additive, top_k=4)
    assert best.scores[:2].isnan().all()
    assert best.ids[:3].tolist() == [12, 30, 5]
    assert best.scores[2] == math.inf
    assert best.scores[3].isfinite()
    merged = run(score_candidates, backend, *rows, *parameters(48), top_k=4, running=best, first_id=100)
    assert merged.ids[:3].tolist() == [12, 30, 5]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pairs=st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 1)), min_size=2, max_size=2, unique=True
    )
)
def test_keys_order_as_scores_then_as_falling_ids_and_give_both_back(pairs):
    scores, ids = torch.tensor([score for score, _ in pairs]), torch.tensor([number for _, number in pairs])
    keys = pack_keys(scores, ids)
    (a, a_id), (b, b_id) = pairs
    assert (keys[0] > keys[1]).item() == ((a, -a_id) > (b, -b_id))
    back_scores, back_ids = unpack_keys(keys)
    assert torch.equal(back_scores, scores)
    assert torch.equal(back_ids, ids)
    assert best_of(keys, 5)[0].tolist() == sorted((a, b), reverse=True)
