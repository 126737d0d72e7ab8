"""The catalogue of compiled variants has everything that dispatch can launch, found by stubbing the kernels."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels.attention import triton_backward, triton_forward
from mixkernels.attention.triton_launch import SHORT_KEYS
from mixkernels.triton_common.variant import KernelVariant
from tests.kernels.attention_cases import FORMS, Case, device_of

pytestmark = pytest.mark.skipif(device_of("triton") == "cuda", reason="kernels are replaced, their results unwritten")

SHORT, FUSED = "candidate_attention_fwd_short_kernel", "candidate_attention_bwd_fused_kernel"
SIZES = ("INTERPRET", "H", "K", "SLOTS", "BLOCK_M", "BLOCK_N", "BLOCK_S", "CO_N", "CO_C", "SO_N")
FLAGS = ("HAS_STATE", "HAS_LENGTHS", "HAS_IDS", "HAS_OWN_LOGITS", "QUANTISED", "PER_QUERY", "HAS_LSE")
# before kernels are replaced
VARIANTS = triton_forward.variants() + triton_backward.variants()
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture
def launched(monkeypatch) -> dict[str, list[dict]]:
    """Options of all launches by kernel; nothing is computed."""
    found: dict[str, list[dict]] = {}

    class Recorded:
        def __init__(self, name: str):
            self.options = found.setdefault(name, [])

        def __getitem__(self, grid):
            return lambda *arguments, **options: self.options.append(options)

    for module, name in (
        (triton_forward, "candidate_attention_fwd_short_kernel"),
        (triton_forward, "candidate_attention_fwd_streamed_kernel"),
        (triton_backward, FUSED),
        (triton_backward, "candidate_attention_bwd_candidates_kernel"),
        (triton_backward, "candidate_attention_bwd_shared_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded(name))
    return found


def catalogued(kernel: str, **constants) -> list[KernelVariant]:
    named = [variant for variant in VARIANTS if variant.kernel.__name__ == kernel]
    return [variant for variant in named if constants.items() <= variant.constants.items()]


# whether the state, lengths, own logits and int8 are there
PARTS = list(product((True, False), repeat=4))


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_short_query_is_compiled_ahead_of_time(launched, form, d):
    for (state, lengths, own_logits, int8), lse in product(PARTS, (False, True)):
        case = Case.random(n=2, m=128, h=1, d=d, form=form, state=state, own_logits=own_logits, int8=int8)
        case = case.changed(
            **{name: t.bfloat16() for name, t in case.tensors.items() if t.is_floating_point() and "own" not in name}
        )
        case.lengths = [128] if lengths else None
        case.run("triton", return_lse=lse)
    options = launched[SHORT]
    assert options
    for launch in options:
        flags = {name: launch[name] for name in (*FLAGS, "D", "BLOCK_N", "BLOCK_M", "SLOTS", "STAGES", "DESCRIPTORS")}
        found = catalogued(SHORT, **flags)
        assert any(variant.signature["key_ptr"] == "*bf16" for variant in found), flags


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [32, 64])
def test_every_length_and_dtype_of_a_short_query_is_compiled_ahead_of_time(launched, d, dtype):
    for m in (1, 16, 17, 33, 65, SHORT_KEYS):
        Case.random(n=2, m=m, h=1, d=d, dtype=dtype).run("triton", return_lse=False)
    options = launched[SHORT]
    assert len({launch["BLOCK_N"] for launch in options}) == 4
    for launch in options:
        constants = {name: launch[name] for name in ("SLOTS", "D", "BLOCK_N", "BLOCK_M", "BLOCK_S", "STAGES")}
        found = catalogued(SHORT, **constants)
        assert any(variant.signature["key_ptr"] == f"*{TYPES[dtype]}" for variant in found), constants


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 32, 64])
def test_every_form_of_the_fused_backward_kernel_is_compiled_ahead_of_time(launched, d, dtype, monkeypatch):
    for m, lengths, own_logits in product((1, 64, 65, SHORT_KEYS), (True, False), (True, False)):
        case = Case.random(n=2, m=m, h=1, d=d, dtype=dtype, own_logits=own_logits, lengths=[m] if lengths else None)
        case.gradients("triton", lse=False)
    monkeypatch.setenv("MIXKERNELS_DETERMINISTIC", "0")
    case.gradients("triton", lse=False)
    options = launched[FUSED]
    assert len(options) == 17
    for launch in options:
        names = ("D", "HAS_LENGTHS", "HAS_OWN_LOGITS", "BLOCK_M", "BLOCK_N", "STAGES")
        constants = {name: launch[name] for name in names}
        if launch["ATOMIC"]:
            constants = {name: launch[name] for name in ("D", "BLOCK_N", "ATOMIC")}
        found = catalogued(FUSED, **constants)
        assert any(variant.signature["key_ptr"] == f"*{TYPES[dtype]}" for variant in found), constants
        assert {variant.num_warps for variant in found} == {launch["num_warps"]}


@pytest.mark.parametrize("deterministic", ["1", "0"])
def test_every_value_of_every_option_is_compiled_ahead_of_time(launched, deterministic, monkeypatch):
    monkeypatch.setenv("MIXKERNELS_DETERMINISTIC", deterministic)
    for form, (state, lengths, own_logits, int8), lse in product(FORMS, PARTS, (False, True)):
        case = Case.random(n=2, k=2, m=7, h=1, form=form, state=state, own_logits=own_logits, int8=int8)
        case.lengths = [7] if lengths else None
        case.run("triton", return_lse=lse)
        if not int8:
            case.gradients("triton", lse=lse)
    # float32 queries are not kept on the chip
    assert [kernel for kernel, options in launched.items() if not options] == [SHORT, FUSED]
    for kernel, options in launched.items():
        for name, values in {name: {launch[name] for launch in options} for name in (options or [{}])[0]}.items():
            if name.isupper() and name not in SIZES:
                for value in values:
                    assert catalogued(kernel, **{name: value}), (kernel, name, value)
