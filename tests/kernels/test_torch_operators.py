"""Candidate attention as a PyTorch operator: opcheck, torch.compile, CUDA graphs, FLOP counting."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import mixkernels
from mixkernels import candidate_attention
from mixkernels.roofline import candidate_attention_cost
from tests.conftest import count_kernel_run
from tests.kernels.attention_cases import FORMS, INPUTS, Case, device_of

BACKENDS = ["torch", "triton"]


def operator_arguments(case: Case, backend: str) -> tuple:
    tensors = [case[name] for name in INPUTS]
    index = [None if values is None else torch.tensor(values) for values in (case.lengths, case.ids, case.offsets)]
    arguments = (*tensors[:6], *index, tensors[6], *(case.scales or (None, None, None)))
    return (*(None if t is None else t.to(device_of(backend)) for t in arguments), 0.25, True, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_forward_operator(backend, form, pytestconfig):
    count_kernel_run(pytestconfig)
    case = Case.random(n=4, k=2, b=2, form=form, lengths=[7, 3])
    mixkernels.candidate_attention  # noqa: B018 the operator is registered when the name is first used
    torch.library.opcheck(torch.ops.mixkernels.candidate_attention.default, operator_arguments(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_logits", [False, True])
def test_opcheck_of_the_backward_operator(backend, own_logits):
    case = Case.random(n=4, k=2, b=2, lengths=[7, 3], own_logits=own_logits)
    *arguments, scale, _, name = operator_arguments(case, backend)
    results = torch.ops.mixkernels.candidate_attention(*arguments, scale, True, name)
    grads = [torch.randn(t.shape, device=t.device) for t in results]
    torch.library.opcheck(
        torch.ops.mixkernels.candidate_attention_backward.default,
        (*grads, *results, *arguments, scale, True, name),
    )


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_one_compilation_serves_every_number_of_candidates(gradients):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return candidate_attention(*tensors, backend="torch").context * 2

    for n in (2, 7, 130):
        case = Case.random(n=n, k=2, b=2)
        tensors = [case[name].requires_grad_(gradients) for name in INPUTS[:6]]
        for tensor in tensors[:4]:
            torch._dynamo.mark_dynamic(tensor, 0)
        got = attend(*tensors)
        want = candidate_attention(*tensors, backend="torch").context * 2
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        if gradients:
            compiled = torch.autograd.grad(got.square().sum(), tensors)
            eager = torch.autograd.grad(want.square().sum(), tensors)
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_flops_are_counted_as_the_roofline_counts_them():
    case = Case.random(n=6, k=3, m=9, b=2)
    tensors = [case[name].requires_grad_() for name in INPUTS[:6]]
    cost = candidate_attention_cost(6, 3, 9, 2, 16, torch.float32, batch=2)
    with FlopCounterMode(display=False) as counter:
        result = candidate_attention(*tensors, backend="torch")
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.mixkernels.candidate_attention] == cost.flops
    with FlopCounterMode(display=False) as counter:
        (result.context.sum() + result.state.sum()).backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.mixkernels.candidate_attention_backward] == cost.flops * 5 // 2


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    case = Case.random(n=50, k=2, b=2, dtype=torch.bfloat16)
    tensors = [case[name].cuda() for name in INPUTS[:6]]
    candidate_attention(*tensors, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = candidate_attention(*tensors, backend="triton")
    for tensor in tensors:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    want = candidate_attention(*tensors, backend="triton")
    assert torch.equal(result.context, want.context)
    assert torch.equal(result.state, want.state)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True])
def test_the_compiled_kernel_serves_every_number_of_candidates(gradients):
    @torch.compile(fullgraph=True, dynamic=True)
    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return candidate_attention(*tensors, backend="triton").context * 2

    for n in (2, 70):
        case = Case.random(n=n, k=2, b=2, dtype=torch.float16)
        tensors = [case[name].cuda().requires_grad_(gradients) for name in INPUTS[:6]]
        want = candidate_attention(*tensors, backend="triton").context * 2
        assert torch.equal(attend(*tensors), want)
