"""The fused backward kernel of short queries: where it runs, and that its gradients keep every promise."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels.attention import triton_backward
from mixkernels.attention.triton_arguments import fused_backward_metadata
from mixkernels.attention.triton_launch import FUSED_DIM, SHORT_KEYS, fused_kind, keeps_short_queries
from mixkernels.triton_common.support import HEAD_DIMS
from tests.kernels.attention_cases import LOW, Case, device_of, far_apart

pytestmark = pytest.mark.skipif(
    not keeps_short_queries(torch.device(device_of("triton"))), reason="this GPU has two kernels for all gradients"
)
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""The largest relative error of rounding."""
NAMES = ("fused", "candidates", "shared")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the backward kernels in the order of their launches."""
    found = []
    for name in NAMES:
        attribute = f"candidate_attention_bwd_{name}_kernel"
        kernel = getattr(triton_backward, attribute)

        class Recorded:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                found.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(triton_backward, attribute, Recorded(name, kernel))
    return found


def gradients(case: Case, config=None, fused: bool = True) -> dict[str, Tensor]:
    """Gradients of contexts and states, by the fused kernel or by the two."""
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(triton_backward, "_fuses", lambda *arguments: None)
        return case.gradients("triton", config, lse=False)


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest error in units of the largest element of a gradient (at least 1)."""
    errors = [(found[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1) for name in exact]
    return torch.stack(errors).max().item()


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({}, ["fused"]),
        ({"form": "per query", "b": 3}, ["fused"]),
        ({"own_logits": True}, ["fused"]),
        ({"m": SHORT_KEYS + 1}, ["candidates", "shared"]),
        ({"b": 2}, ["candidates", "shared"]),
        ({"k": 2}, ["candidates", "shared"]),
        ({"state": False}, ["candidates", "shared"]),
        ({"form": "gathered"}, ["candidates", "shared"]),
        ({"form": "ragged"}, ["candidates", "shared"]),
        ({"dtype": torch.float32}, ["candidates", "shared"]),
        ({"d": 128, "h": 1}, ["candidates", "shared"]),
    ],
)
def test_it_runs_where_no_register_spills_and_every_candidate_is_one_querys(launched, changes, kernels, pytestconfig):
    case = Case.random(**{"n": 3, "m": 5, "dtype": torch.bfloat16, **changes})
    case.gradients("triton", pytestconfig, lse=False)
    assert launched == kernels


def test_gradients_of_log_sum_exps_and_of_candidates_alone_have_their_own_kernels(launched, pytestconfig):
    case = Case.random(n=3, m=5, dtype=torch.float16)
    case.gradients("triton", pytestconfig, lse=True)
    assert launched == ["candidates", "shared"]
    launched.clear()
    frozen = case.changed(context_query=case["context_query"].clone().requires_grad_())
    frozen.call("triton", pytestconfig, return_lse=False).context.sum().backward()
    assert launched == ["candidates"]


def test_its_kinds_are_those_of_small_heads_in_16_bits():
    for dim in HEAD_DIMS:
        found = fused_kind(1, SHORT_KEYS, dim, 2, has_state=True)
        assert (found is not None) == (dim <= FUSED_DIM)
    assert fused_kind(1, SHORT_KEYS // 2, 64, 2, has_state=True).few_keys
    assert not fused_kind(1, SHORT_KEYS // 2 + 1, 64, 2, has_state=True).few_keys


def test_profilers_learn_its_work():
    # 7 candidates of two rows, 5 keys: of a row and key five products of D = 4, 2 FLOPs a multiply-add; own keys on top
    arguments = {"H": 2, "D": 4, "num_keys": 5, "batch": 1, "key_ptr": torch.zeros(1, dtype=torch.float16)}
    arguments["grad_context_ptr"] = torch.zeros(7, 1, 2, 4, dtype=torch.float16)
    found = fused_backward_metadata((1,), SimpleNamespace(name="fused"), arguments)
    assert found["name"] == "fused k=1 D=4 m=5"
    assert found["flops16"] == 5 * 2 * 4 * 2 * 7 * (2 * 5 + 1)
    assert found["bytes"] > 0


# a tile has 64 or 32 candidates, a block 64 or 128 keys; the last are not full
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 16), (65, 9, 64), (70, 64, 32), (66, 65, 64), (130, 128, 16)])
@pytest.mark.parametrize("own", ["own keys", "own logits"])
@pytest.mark.parametrize("form", ["pool", "per query"])
def test_they_equal_those_of_the_formula_and_of_the_two_kernels(launched, dtype, n, m, d, own, form, pytestconfig):
    b = 1 if form == "pool" else 3
    case = Case.random(n=n, m=m, d=d, b=b, h=1, form=form, dtype=dtype, own_logits=own == "own logits")
    case.lengths = None if form == "pool" else [m, 0, (m + 1) // 2]
    found = gradients(case, pytestconfig)
    assert launched == ["fused"]
    assert worst(found, case.double().gradients("reference", lse=False)) < 8 * UNIT[dtype]
    if device_of("triton") == "cpu":
        # interpreted kernels compute in float32, so only the last rounding may differ
        for name, other in gradients(case, fused=False).items():
            torch.testing.assert_close(found[name], other, rtol=2 * UNIT[dtype], atol=1e-5, msg=name)


@pytest.mark.parametrize("length", [0, 3, 7])
@pytest.mark.parametrize("m", [7, 100])
def test_padding_has_finite_weights_whatever_the_logits_are(launched, length, m, pytestconfig):
    # logits of about -1,000 and own ones of -900: weights of zero keys would be infinite
    case = Case.random(n=5, m=m, d=16, h=1, form="per query", dtype=torch.float16, own_logits=True)
    case = case.changed(own_logits=case["own_logits"] - 900)
    keys = case["key"].abs() + 1
    rows = {name: -(case[name].abs() + 20) for name in ("context_query", "state_query")}
    case = case.changed(key=keys * 6, **rows)
    case.lengths = [length]
    exact = case.double().gradients("reference", lse=False)
    found = gradients(case, pytestconfig)
    assert launched == ["fused"]
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert worst(found, exact) < 8 * UNIT[torch.float16]
    # the tail of the keys is padding
    assert not found["key"][:, length:].any()
    assert not found["value"][:, length:].any()


def test_two_runs_give_the_same_bits_and_a_candidate_keeps_them_in_other_company(launched, pytestconfig):
    case = Case.random(n=200, m=33, d=16, h=1, dtype=torch.bfloat16)
    first, second = gradients(case, pytestconfig), gradients(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    # the gradients of the outputs are ones, so that they do not depend on the order
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:67]
    names = [name for name in case.tensors if name not in ("key", "value")]

    def own_gradients(case: Case) -> list[Tensor]:
        leaves = case.changed(**{name: t.clone().requires_grad_() for name, t in case.tensors.items()})
        result = leaves.call("triton", return_lse=False)
        (result.context.sum() + result.state.sum()).backward()
        return [leaves[name].grad for name in names]

    for name, whole, alone in zip(names, own_gradients(case), own_gradients(case.pick(chosen)), strict=True):
        assert torch.equal(whole[chosen], alone), name
    assert set(launched) == {"fused"}


@pytest.mark.parametrize("form", ["pool", "per query"])
def test_every_gradient_element_is_written(launched, form, pytestconfig):
    case = Case.random(n=50, m=5, form=form, lengths=[0], dtype=torch.float16)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        found = gradients(case, pytestconfig)
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched == ["fused"]
    assert not any(gradient.isnan().any() for gradient in found.values())


@pytest.mark.parametrize("own", ["own keys", "own logits"])
def test_offsets_of_candidates_are_64_bits_wide(launched, own, pytestconfig):
    case = Case.random(n=3, h=1, m=3, dtype=torch.float16, own_logits=own == "own logits")
    names = [name for name in case.tensors if name.startswith(("context", "own", "state"))]
    wide = case.changed(**{name: far_apart(case[name], 2**30) for name in names})
    want = gradients(case, pytestconfig)
    for name, gradient in gradients(wide).items():
        assert torch.equal(gradient, want[name]), name
    assert launched == ["fused", "fused"]


def test_atomic_sums_are_an_option(launched, monkeypatch, pytestconfig):
    case = Case.random(n=200, m=5, h=1, dtype=torch.bfloat16)
    want = gradients(case, pytestconfig)
    monkeypatch.setenv("MIXKERNELS_DETERMINISTIC", "0")
    for name, gradient in gradients(case).items():
        torch.testing.assert_close(gradient, want[name], rtol=2 * UNIT[torch.bfloat16], atol=1e-5, msg=name)
    assert launched == ["fused", "fused"]
