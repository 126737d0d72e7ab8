"""Calls of a known form: the same results and errors, launched directly, and seen by whatever wants to see them."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mixkernels
from mixkernels import candidate_attention, gate_layer_norm, plans, residual_layer_norm, score_candidates
from mixkernels.attention.operator import _PLANS
from tests.kernels.attention_cases import FORMS, Case, device_of

fast_backends = pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
"""The backends that keep plans."""


def layer_calls(backend: str, seed: int) -> dict[str, Callable]:
    """Return calls of every operator other than attention on new tensors, by name."""
    device, generator = device_of(backend), torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    parameters, pool, additive = (rows(16), rows(16)), rows(7, 16), rows(7)
    x, residual, state = (rows(2, 7, 16) for _ in range(3))
    running = (rows(2, 3).sort(descending=True).values, torch.arange(6, device=device).view(2, 3) + 100)
    batch = (rows(2, 7, 3, 16), rows(7, 3, 16), rows(2, 7, 16), rows(2, 7, 16), *parameters)
    single = (rows(7, 3, 16), rows(7, 3, 16), rows(7, 16), rows(7, 16), *parameters)

    def of(function: Callable, *tensors: Tensor | None, **options) -> Callable:
        return lambda **more: function(*tensors, backend=backend, **options, **more)

    return {
        "residual": of(residual_layer_norm, x, residual, *parameters),
        "pool": of(residual_layer_norm, x, pool, *parameters),
        "gate": of(gate_layer_norm, x, residual, state, *parameters),
        "gate of a pool": of(gate_layer_norm, x, residual, pool, *parameters),
        "first gate": of(gate_layer_norm, x, residual, None, *parameters),
        "scores": of(score_candidates, *batch, additive=additive),
        "one query": of(score_candidates, *single, additive=additive),
        "best": of(score_candidates, *batch, top_k=5, running=running, first_id=7 * seed),
        "best of one query": of(score_candidates, *single, top_k=5, first_id=2**30 * seed),
    }


def tensors_of(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]


def assert_equal(got: object, want: object) -> None:
    for one, other in zip(tensors_of(got), tensors_of(want), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
@fast_backends
def test_attention_of_a_known_form_gives_the_same(backend, form, k, dtype):
    cases = [Case.random(n=5, k=k, b=2, form=form, lengths=[7, 3 + seed], dtype=dtype, seed=seed) for seed in (0, 1, 1)]
    for case in cases:
        case.ids, case.offsets = cases[0].ids, cases[0].offsets
    fresh = []
    for case in cases:
        plans.clear()
        fresh.append(case.run(backend))
    assert len(_PLANS) == 1
    # hashed once, then found among the most recent
    for case, want in zip(cases, fresh, strict=True):
        assert_equal(case.run(backend), want)
    assert len(_PLANS) == 1


@pytest.mark.parametrize("name", layer_calls("torch", 0))
@fast_backends
def test_other_operators_of_a_known_form_give_the_same(backend, name):
    fresh = []
    for seed in range(4):
        plans.clear()
        fresh.append(layer_calls(backend, seed)[name]())
    for seed in range(4):
        assert_equal(layer_calls(backend, seed)[name](), fresh[seed])


def small(**changes) -> dict[str, Tensor]:
    randn = torch.randn
    inputs = {f"context_{name}": randn(3, 2, 2, 16) for name in ("query", "key", "value")}
    inputs |= {"state_query": randn(3, 2, 16), "key": randn(1, 4, 2, 16), "value": randn(1, 4, 2, 16)}
    return inputs | {"key_lengths": torch.tensor([3])} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_lengths": torch.tensor([5])}, "5.*0..4"),
        ({"value": torch.randn(1, 5, 2, 16)}, r"value has shape \(1, 5, 2, 16\)"),
        ({"value": torch.randn(1, 4, 2, 16).half()}, "value has dtype torch.float16"),
        ({"key": [1.0]}, "key is a list"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
        ({"context_scales": (None, None)}, "2 tensors"),
        ({"state_query": torch.randn(3, 2, 16).to_sparse()}, "unsupported memory format"),
    ],
)
def test_a_mistake_is_named_after_good_calls_too(changes, words):
    for _ in range(3):
        candidate_attention(**small(backend="torch"))
    with pytest.raises(Exception, match=words):
        candidate_attention(**small(backend="torch") | changes)


def test_running_ids_are_checked_at_every_call():
    call, ids = layer_calls("torch", 0)["best"], torch.tensor([[1, 2, -1]] * 2)
    call()
    running = (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.int64))
    rows = torch.randn(2, 7, 1, 16), torch.randn(2, 7, 16)
    arguments = (rows[0], rows[0], rows[1], rows[1], torch.ones(16), torch.ones(16))
    score_candidates(*arguments, top_k=2, running=running)
    with pytest.raises(mixkernels.ShapeError, match="running ids reach from -1"):
        score_candidates(*arguments, top_k=2, running=(running[0], ids))
    with pytest.raises(mixkernels.ShapeError, match="ids reach from -1"):
        score_candidates(*arguments, top_k=2, running=running, first_id=-1)
    with pytest.raises(mixkernels.ShapeError, match="top_k is True"):
        score_candidates(*arguments, top_k=True)


def test_the_environment_is_read_at_every_call(monkeypatch):
    inputs = small()
    for _ in range(3):
        candidate_attention(**inputs)
    monkeypatch.setenv("MIXKERNELS_BACKEND", "fastest")
    with pytest.raises(mixkernels.BackendError, match="no backend 'fastest'"):
        candidate_attention(**inputs)


@fast_backends
def test_what_wants_to_see_an_operator_sees_it(backend):
    case = Case.random(n=3, k=1, m=4)
    for _ in range(3):
        want = case.run(backend)
    with FlopCounterMode(display=False) as counter:
        case.run(backend)
    assert counter.get_total_flops() == 4 * 16 * 2 * 3 * (2 * 4 + 1)

    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        assert_equal(case.run(backend), want)
    assert "mixkernels.candidate_attention.default" in names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.run(backend)
    assert any(event.name == "mixkernels::candidate_attention" for event in profile.events())


@fast_backends
def test_gradients_flow_where_calls_without_came_before(backend):
    case = Case.random(n=3, k=2, m=4)
    for _ in range(3):
        case.run(backend)
    first, second = case.gradients(backend), case.gradients(backend)
    want = case.double().gradients("reference")
    for name, gradient in second.items():
        assert torch.equal(gradient, first[name])
        assert torch.allclose(gradient.double(), want[name], atol=1e-4)


def test_whole_graphs_are_compiled_where_plans_are_known():
    inputs = {name: tensor for name, tensor in small(backend="torch").items() if name != "key_lengths"}
    for _ in range(3):
        want = candidate_attention(**inputs)
    compiled = torch.compile(candidate_attention, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**inputs), want)
    out = (torch.empty_like(want.context), torch.empty_like(want.state))
    compiled(**inputs, out=out)
    assert_equal(out, want[:2])


def test_views_that_hold_negated_numbers_are_negated():
    inputs = small(backend="torch")
    for _ in range(3):
        candidate_attention(**inputs)
    query = inputs["context_query"]
    negated = torch.complex(query, -query).conj().imag
    assert negated.is_neg()
    want = candidate_attention(**inputs)
    assert_equal(candidate_attention(**{**inputs, "context_query": negated}), want)


def test_autocast_and_inference_mode_are_as_without_plans():
    inputs = small(backend="torch")
    for _ in range(3):
        want = candidate_attention(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert candidate_attention(**inputs).context.dtype == torch.bfloat16
    with torch.inference_mode():
        got = candidate_attention(**inputs)
    assert got.context.is_inference()
    assert_equal(got, want)


@fast_backends
def test_plans_hold_no_tensors(backend):
    case = Case.random(n=3, k=1, m=4, dtype=torch.bfloat16)
    calls = layer_calls(backend, 0)
    for _ in range(3):
        kept = [weakref.ref(tensor) for tensor in (*case.tensors.values(), *case.run(backend))]
        kept += [weakref.ref(tensor) for call in calls.values() for tensor in tensors_of(call())]
    assert len(_PLANS) == 1
    del case, calls
    gc.collect()
    assert not [reference for reference in kept if reference() is not None]


def test_the_oldest_plans_are_forgotten():
    few = plans.Plans(most=3)
    tensors = [torch.zeros(size) for size in range(1, 6)]
    for tensor in tensors:
        plan, form = few.find((tensor,), None)
        assert plan is None
        few.remember(form, len(tensor))
    assert len(few) == 3
    assert [few.find((tensor,), None)[0] for tensor in tensors] == [None, None, 3, 4, 5]
    # now the last ones are found without hashing
    assert [few.find((tensor,), None)[0] for tensor in tensors] == [None, None, 3, 4, 5]
    assert few.find((tensors[4], None), None)[0] is None
    assert few.find((tensors[4],), None, "flag")[0] is None
    assert few.find((torch.zeros(6)[1:],), None)[0] is None


def test_threads_share_plans():
    cases = [Case.random(n=n, k=1, m=4) for n in range(1, 9)]
    wanted = [case.run("torch") for case in cases]
    plans.clear()
    failed = []

    def work(offset: int) -> None:
        for number in range(64):
            case = (number * offset) % len(cases)
            try:
                assert_equal(cases[case].run("torch"), wanted[case])
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(_PLANS) == len(cases)


@pytest.mark.gpu
def test_a_known_form_is_captured_in_a_graph():
    case = Case.random(n=300, k=1, m=70, d=64, dtype=torch.bfloat16)
    tensors = {name: tensor.cuda() for name, tensor in case.tensors.items()}
    for _ in range(3):
        want = candidate_attention(**tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = candidate_attention(**tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(got, want)
