"""`mixkernels.explain`: the backend, the reasons and the limit of a call that is not made."""

import pytest
import torch

import mixkernels
from mixkernels import BackendError, DeviceError, Explanation, ShapeError, explain
from mixkernels.explanation import duration, quantity
from mixkernels.roofline import candidate_attention_cost


def arguments(n=6, k=2, m=5, heads=2, dim=16, *, batch=1, dtype=torch.float32, device="cpu", per_query=False):
    torch.manual_seed(0)
    lead = (batch, n) if per_query else (n,)
    context = torch.randn(*lead, k, heads, dim, dtype=dtype, device=device)
    tokens = torch.randn(batch, m, heads, dim, dtype=dtype, device=device)
    return context, context, context, context[..., 0, :, :], tokens, tokens


def test_it_is_bound_at_the_top_whatever_was_imported_before():
    import mixkernels.explanation

    assert mixkernels.explain is mixkernels.explanation.explain


def test_a_call_of_a_terabyte_is_explained_without_being_made():
    # tensors without memory: nothing could be computed, nor was anything allocated
    found = explain(*arguments(10**8, 1, 64, 12, 64, dtype=torch.bfloat16, device="meta"), device="H100 SXM")
    assert isinstance(found, Explanation)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(0.275, rel=5e-3)
    assert found.seconds == found.limits["memory"]
    assert found.device == "H100 SXM, data sheet"


def test_long_queries_are_bound_by_the_matrix_units():
    found = explain(*arguments(10**5, 1, 512, 12, 64, dtype=torch.bfloat16, device="meta"), device="H100 SXM")
    assert found.bound == "matrix units"


def test_a_narrow_head_is_bound_by_exponentials_when_the_query_is_long():
    found = explain(*arguments(10**5, 1, 512, 24, 32, dtype=torch.bfloat16, device="meta"), device="H100 SXM")
    assert found.bound == "exponentials"


def test_it_names_the_backend_that_runs_and_why_others_would_not():
    found = explain(*arguments(dim=48))
    assert found.backend == "torch"
    assert found.reasons["triton"] == ("head dimension 48 is not one of 16, 32, 64, 128",)
    assert found.reasons["reference"] == ()
    text = str(found)
    assert "backend    torch" in text
    assert "triton: head dimension 48 is not one of" in text
    assert "reference: can run it, but is never chosen by auto" in text
    assert f"bound by   {found.bound}" in text


def test_the_chosen_backend_is_the_one_that_is_asked_for(monkeypatch):
    assert explain(*arguments(), backend="reference").backend == "reference"
    monkeypatch.setenv("MIXKERNELS_BACKEND", "reference")
    assert explain(*arguments()).backend == "reference"


def test_numbers_are_those_of_the_roofline_in_every_form():
    n, k, m, heads, dim, batch = 6, 2, 5, 2, 16, 3
    sizes = (k, m, heads, dim, torch.float32)

    def of(found):
        return found.flops, found.bytes, found.exps

    pool = arguments(n, *sizes[:4], batch=batch)
    assert of(explain(*pool)) == candidate_attention_cost(n, *sizes, batch=batch)
    assert of(explain(*pool, return_lse=True)) == candidate_attention_cost(n, *sizes, batch=batch, return_lse=True)
    each = arguments(n, *sizes[:4], batch=batch, per_query=True)
    assert of(explain(*each)) == candidate_attention_cost(n, *sizes, batch=batch, form="per_query")
    ids = torch.zeros(batch, 4, dtype=torch.int64)
    want = candidate_attention_cost(4, *sizes, batch=batch, form="gathered", pool_size=n)
    assert of(explain(*pool, candidate_ids=ids)) == want
    offsets = torch.tensor([0, 1, 1, n])
    want = candidate_attention_cost(n, *sizes, batch=batch, form="ragged")
    assert of(explain(*pool, candidate_offsets=offsets)) == want
    want = candidate_attention_cost(4, *sizes, batch=batch, form="ragged_gather", pool_size=n)
    found = explain(*pool, candidate_ids=ids[0], candidate_offsets=torch.tensor([0, 1, 1, 4]))
    assert of(found) == want
    assert "ragged gather" in str(found)
    query, _, value, state, key, tokens = pool
    logits = torch.randn(n, k, k, heads)
    want = candidate_attention_cost(n, *sizes, batch=batch, own_logits=True)
    assert of(explain(query, None, value, state, key, tokens, own_logits=logits)) == want
    want = candidate_attention_cost(n, *sizes, batch=batch, has_state=False)
    assert of(explain(query, query, value, None, key, tokens)) == want
    scale, small = torch.ones(n, k, heads), query.to(torch.int8)
    want = candidate_attention_cost(n, *sizes, batch=batch, int8=True)
    found = explain(small, small, small, state, key, tokens, context_scales=(scale, scale, scale))
    assert of(found) == want
    assert "int8 candidates" in str(found)


def test_autocast_counts_the_bytes_of_what_will_run():
    full = explain(*arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = explain(*arguments())
    assert half.bytes * 2 == full.bytes


def test_it_refuses_what_the_operator_refuses_in_the_same_words():
    query, *rest = arguments()
    wrong = (query[..., :8], *rest)
    with pytest.raises(ShapeError) as expected:
        mixkernels.candidate_attention(*wrong)
    with pytest.raises(ShapeError) as found:
        explain(*wrong)
    assert str(found.value) == str(expected.value)
    with pytest.raises(BackendError, match="head dimension 48"):
        explain(*arguments(dim=48), backend="triton")
    with pytest.raises(DeviceError, match="H100 SXM, H200, A100 80GB"):
        explain(*arguments(), device="H900")


def test_an_explanation_cannot_be_changed():
    with pytest.raises(AttributeError):
        explain(*arguments()).backend = "triton"


def test_amounts_are_written_for_people():
    assert quantity(9.2e9, "B") == "9.20 GB"
    assert quantity(12, "exp") == "12 exp"
    assert [duration(t) for t in (2.5, 2.75e-3, 3e-6)] == ["2.500 s", "2.750 ms", "3.0 us"]
