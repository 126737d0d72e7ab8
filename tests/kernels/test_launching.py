"""The second launch of a form calls the compiled kernel itself, with what Triton's launcher would have passed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels import candidate_attention
from mixkernels.attention import triton_forward
from mixkernels.layer import triton_layer_norm, triton_scoring
from mixkernels.triton_common import launching
from tests.kernels.attention_cases import FORMS, Case, device_of
from tests.kernels.test_plans import layer_calls

pytestmark = pytest.mark.skipif(device_of("triton") == "cuda", reason="kernels are replaced, their results unwritten")

KERNELS = (
    (triton_forward, "candidate_attention_fwd_short_kernel"),
    (triton_forward, "candidate_attention_fwd_streamed_kernel"),
    (triton_layer_norm, "residual_layer_norm_fwd_kernel"),
    (triton_layer_norm, "gate_layer_norm_fwd_kernel"),
    (triton_scoring, "score_candidates_fwd_kernel"),
)
OPTIONS = ("num_warps", "num_stages")


class Replaced:
    """A kernel that records launches by way of Triton's launcher, and of what that compiled."""

    function, packed_metadata = 7, (1,)

    def __init__(self, kernel) -> None:
        self.arg_names, self.bound, self.direct = kernel.arg_names, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
            named = dict(zip(self.arg_names, values, strict=False))
            named |= {name: value for name, value in options.items() if name not in OPTIONS}
            assert named.keys() == set(self.arg_names)
            self.bound.append((grid, named))
            return self

        return launch

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (y, z, stream, function, metadata, launch_metadata, enter, leave) == (1, 1, 5, 7, (1,), None, None, None)
        self.direct.append(((x,), dict(zip(self.arg_names, arguments, strict=True))))


@pytest.fixture
def kernels(monkeypatch) -> dict[str, Replaced]:
    replaced = {}
    for module, name in KERNELS:
        replaced[name] = Replaced(getattr(module, name))
        monkeypatch.setattr(module, name, replaced[name])
    monkeypatch.setattr(launching, "_is_current", lambda device: True)
    monkeypatch.setattr(launching, "_stream", lambda device: 5)
    monkeypatch.setattr(launching, "_DIRECT", True)
    return replaced


def same_but_for_outputs(first, second) -> None:
    """Compare two launches; results of the second call have memory of their own."""
    assert first[0] == second[0]
    outputs = {"context_ptr", "state_ptr", "context_lse_ptr", "state_lse_ptr", "out_ptr", "scores_ptr", "keys_ptr"}
    # an absent tensor's pointer is that of an output
    new = {first[1][name] for name in outputs & first[1].keys()}
    for name, value in first[1].items():
        if not (name.endswith("_ptr") and value in new):
            assert second[1][name] == value, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_launched_as_by_triton(kernels, form, dtype):
    case = Case.random(n=5, k=1, b=2, form=form, lengths=[7, 3], dtype=dtype)
    tensors = {"key_lengths": torch.tensor([7, 3])}
    tensors |= {} if case.ids is None else {"candidate_ids": torch.tensor(case.ids)}
    tensors |= {} if case.offsets is None else {"candidate_offsets": torch.tensor(case.offsets)}
    with torch.no_grad():
        for _ in range(3):
            results = candidate_attention(**case.tensors, **tensors, scale=0.3, return_lse=True, backend="triton")
            assert results.context.dtype == dtype
    (kernel,) = [kernel for kernel in kernels.values() if kernel.bound]
    assert (len(kernel.bound), len(kernel.direct)) == (1, 2)
    for launch in kernel.direct:
        same_but_for_outputs(kernel.bound[0], launch)
        assert launch[1]["key_ptr"] == case["key"].data_ptr()
        assert launch[1]["scale"] == 0.3


@pytest.mark.parametrize("name", layer_calls("triton", 1))
def test_other_operators_are_launched_as_by_triton(kernels, name):
    call = layer_calls("triton", 1)[name]
    for _ in range(3):
        call()
    (kernel,) = [kernel for kernel in kernels.values() if kernel.bound]
    assert (len(kernel.bound), len(kernel.direct)) == (1, 2)
    for launch in kernel.direct:
        same_but_for_outputs(kernel.bound[0], launch)


def test_other_scales_and_ids_need_no_new_form(kernels):
    case = Case.random(n=5)
    for scale in (0.1, 0.2, 0.3):
        case.run("triton", scale=scale)
    kernel = kernels["candidate_attention_fwd_streamed_kernel"]
    assert [launch[1]["scale"] for launch in kernel.direct] == [0.2, 0.3]


def test_triton_s_hooks_are_told_of_every_launch(kernels, monkeypatch):
    case = Case.random(n=5)
    kernel = kernels["candidate_attention_fwd_streamed_kernel"]
    for hooks in (
        SimpleNamespace(launch_enter_hook=lambda metadata: None, launch_exit_hook=None),
        SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[print])),
    ):
        monkeypatch.setattr(launching, "_runtime", lambda hooks=hooks: hooks)
        before = len(kernel.bound)
        for _ in range(2):
            case.run("triton")
        assert len(kernel.bound) == before + 2
    assert not kernel.direct
    # none is installed
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    monkeypatch.setattr(launching, "_runtime", lambda: hooks)
    case.run("triton")
    assert len(kernel.direct) == 1


def test_an_unknown_version_of_triton_launches_itself(kernels, monkeypatch):
    monkeypatch.setattr(launching, "_DIRECT", False)
    case = Case.random(n=5)
    for _ in range(3):
        case.run("triton")
    kernel = kernels["candidate_attention_fwd_streamed_kernel"]
    assert (len(kernel.bound), len(kernel.direct)) == (3, 0)


def test_pointers_of_another_alignment_are_another_form(kernels):
    case = Case.random(n=5)
    key = torch.randn(case["key"].numel() + 1)[1:].view(case["key"].shape)
    for tensors in (case, case.changed(key=key), case, case.changed(key=key)):
        tensors.run("triton")
    kernel = kernels["candidate_attention_fwd_streamed_kernel"]
    assert (len(kernel.bound), len(kernel.direct)) == (2, 2)
