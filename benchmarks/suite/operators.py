"""Every operator of mixkernels against its standard formulations: forward, backward, and the whole training step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention import (
    LARGEST_ERROR,
    Shape,
    Step,
    attention_error,
    backward_alone,
    gradients,
    random_step,
    reference_gradients,
    relative_error,
)
from benchmarks.gpu.formulations import BATCH_RIVALS, Call, einsum_batch, ours, ours_batch
from benchmarks.gpu.layer import LAYER_OPERATORS, layer_error, plain_residual_layer_norm
from benchmarks.measuring.costs import (
    gate_layer_norm_backward_cost,
    residual_layer_norm_backward_cost,
    score_candidates_backward_cost,
)
from benchmarks.measuring.formulations import RIVALS, Inputs, expand, sdpa_on_expanded
from benchmarks.suite.case import Case, Contender, Prepared
from mixkernels import score_candidates
from mixkernels.roofline import Cost, candidate_attention_backward_cost, candidate_attention_cost, score_candidates_cost

HEADLINE = Shape(1000, 1, 64, 64)
SHAPES = (
    HEADLINE,
    Shape(100, 1, 64, 64),
    Shape(10_000, 1, 64, 64),
    Shape(1000, 4, 64, 64),
    Shape(1000, 1, 16, 64),
    Shape(1000, 1, 256, 64),
)
STEP = Shape(32, 1, 64, 64, batch=32)
QUICK_STEP = Shape(16, 1, 64, 64, batch=16)
LONG_STEP = Shape(64, 1, 64, 64, batch=64)
LAYER_ROWS, LAYER_WIDTH = 10_000, 384
EXPANDED = "sdpa-expanded"
PRE_EXPANDED = "sdpa-pre-expanded"
EAGER = (EXPANDED, PRE_EXPANDED, "einsum-concatenated", "two-pass")
QUICK_RIVALS = (EXPANDED, "einsum-concatenated", "two-pass")
COMPILED = ("einsum-concatenated", "two-pass-compiled", "flex-compiled")
BACKWARD, STEP_OF = "candidate_attention backward", "candidate_attention training step"


def checked(found: float, dtype: torch.dtype, name: str) -> None:
    """Raise if a relative distance from the reference is too large for a dtype.

    Raises:
        AssertionError: it is larger than `LARGEST_ERROR` of the dtype, or NaN.
    """
    if not found <= LARGEST_ERROR[dtype]:
        raise AssertionError(f"{name} is off by {found:.2g}; allowed are {LARGEST_ERROR[dtype]:.2g}")


# -- candidate attention -----------------------------------------------------------------------------------------------


def attention_case(shape: Shape, dtype: torch.dtype, rivals: Sequence[str] = EAGER, **options: Any) -> Case:
    """One query against N candidates."""
    sizes = {name: size for name, size in shape.names().items() if name != "B"}
    return Case(
        "operators",
        "candidate_attention",
        sizes,
        dtype,
        ("torch",),
        tuple(rivals),
        partial(_prepare_attention, shape, dtype),
        unavailable=partial(_attention_unavailable, shape, dtype),
        **options,
    )


def _attention_unavailable(shape: Shape, dtype: torch.dtype, contender: str) -> str | None:
    if shape.n <= 1000:
        return None
    if contender == PRE_EXPANDED:
        return f"{PRE_EXPANDED}: expanded keys and values would take gigabytes"
    if contender == EXPANDED and dtype != torch.float32:
        return f"{EXPANDED}: takes seconds per call, timed only in float32"
    return None


def _prepare_attention(shape: Shape, dtype: torch.dtype, names: Collection[str]) -> Prepared:
    sizes = (shape.n, shape.k, shape.m, shape.h, shape.d)
    inputs = Inputs.random(*sizes, dtype)
    contenders = {}
    for name in names:
        if name == "torch":
            contenders[name] = Contender(partial(ours, inputs, "torch"))
        elif name == PRE_EXPANDED:
            contenders[name] = Contender(partial(sdpa_on_expanded, inputs, *expand(inputs)))
        else:
            contenders[name] = Contender(partial(RIVALS[name], inputs))
    return Prepared(
        contenders,
        lambda name, result: checked(attention_error(result, inputs), dtype, name),
        candidate_attention_cost(*sizes, dtype),
    )


# -- gradients of candidate attention ----------------------------------------------------------------------------------


def training_case(
    shape: Shape, *, forward_too: bool, rivals: Sequence[str] = tuple(BATCH_RIVALS), **options: Any
) -> Case:
    """A pool of N candidates shared by B queries, float32: gradients of all six inputs, with or without forward."""
    return Case(
        "operators",
        STEP_OF if forward_too else BACKWARD,
        shape.names(),
        torch.float32,
        ("torch",),
        tuple(rivals),
        partial(_prepare_training, shape, forward_too),
        gradients=True,
        **options,
    )


def _prepare_training(shape: Shape, forward_too: bool, names: Collection[str]) -> Prepared:
    dtype = torch.float32
    forwards: dict[str, Callable[..., Any]] = {"torch": partial(ours_batch, backend="torch"), **BATCH_RIVALS}
    if "einsum-compiled" in names:
        forwards["einsum-compiled"] = torch.compile(einsum_batch, dynamic=False, fullgraph=True)
    step = random_step(shape, dtype, "cpu")
    arguments = (shape.n, shape.k, shape.m, shape.h, shape.d, dtype)
    cost = candidate_attention_backward_cost(*arguments, batch=shape.batch)
    if forward_too:
        cost = candidate_attention_cost(*arguments, batch=shape.batch, return_lse=True).and_then(cost)
    exact = reference_gradients(step)
    return Prepared(
        {name: Contender(mode_call(forwards[name], step, forward_too=forward_too)) for name in names},
        lambda name, result: checked(relative_error(result, exact), dtype, name),
        cost,
    )


def mode_call(forward: Callable[..., Any], step: Step, *, forward_too: bool) -> Call:
    """Return a training step, or only its backward pass."""
    return partial(gradients, forward, step) if forward_too else backward_alone(forward, step)


# -- the rest of the layer ---------------------------------------------------------------------------------------------


def plain_scores(
    context: Tensor, context_residual: Tensor, state: Tensor, state_residual: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Scores of candidates in plain PyTorch."""
    pooled = plain_residual_layer_norm(context, context_residual, weight, bias).mean(-2)
    return (plain_residual_layer_norm(state, state_residual, weight, bias) * pooled).sum(-1)


def _layer_functions(operator: str, top_k: bool) -> dict[str, Callable[..., Any]]:
    if operator == "score_candidates" and not top_k:
        return {"torch": partial(score_candidates, backend="torch"), "pytorch": plain_scores}
    entry = LAYER_OPERATORS[operator]
    return {"torch": partial(entry.ours, backend="torch"), "pytorch": entry.plain}


def layer_case(operator: str, rivals: Sequence[str] = ("pytorch",), **options: Any) -> Case:
    """An operator between the layer's products, forward; for scores the best ten, as in ranking."""
    return Case(
        "operators",
        operator,
        {"N": LAYER_ROWS, "d": LAYER_WIDTH},
        torch.float32,
        ("torch",),
        tuple(rivals),
        partial(_prepare_layer, operator),
        **options,
    )


def _layer_tensors(operator: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [*LAYER_OPERATORS[operator].shapes(LAYER_ROWS, LAYER_WIDTH), (LAYER_WIDTH,), (LAYER_WIDTH,)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _prepare_layer(operator: str, names: Collection[str]) -> Prepared:
    tensors = _layer_tensors(operator)
    functions = _layer_functions(operator, top_k=True)
    if "pytorch-compiled" in names:
        functions["pytorch-compiled"] = torch.compile(functions["pytorch"], dynamic=False, fullgraph=True)
    return Prepared(
        {name: Contender(partial(functions[name], *tensors)) for name in names},
        lambda name, result: checked(layer_error(operator, result, tensors), torch.float32, name),
        LAYER_OPERATORS[operator].cost(LAYER_ROWS, LAYER_WIDTH, torch.float32),
    )


_BACKWARD_COSTS: Mapping[str, Callable[[], Cost]] = {
    # context rows and state row of every candidate
    "residual_layer_norm": lambda: residual_layer_norm_backward_cost(2 * LAYER_ROWS, LAYER_WIDTH, torch.float32),
    "gate_layer_norm": lambda: gate_layer_norm_backward_cost(LAYER_ROWS, LAYER_WIDTH, torch.float32),
    "score_candidates": lambda: score_candidates_backward_cost(LAYER_ROWS, 1, LAYER_WIDTH, torch.float32),
}


def layer_training_case(operator: str, *, forward_too: bool, **options: Any) -> Case:
    """The gradients of an operator between the layer's products, with or without its forward pass."""
    return Case(
        "operators",
        f"{operator} {'training step' if forward_too else 'backward'}",
        {"N": LAYER_ROWS, "d": LAYER_WIDTH},
        torch.float32,
        ("torch",),
        ("pytorch",),
        partial(_prepare_layer_training, operator, forward_too),
        gradients=True,
        **options,
    )


def _prepare_layer_training(operator: str, forward_too: bool, names: Collection[str]) -> Prepared:
    tensors = tuple(tensor.requires_grad_() for tensor in _layer_tensors(operator))
    functions = _layer_functions(operator, top_k=False)
    with torch.no_grad():
        shape = functions["pytorch"](*tensors).shape
    step = Step(tensors, (torch.randn(shape, generator=torch.Generator().manual_seed(1)),))
    exact_step = Step(tuple(t.detach().double().requires_grad_() for t in tensors), (step.grads[0].double(),))
    exact = gradients(functions["pytorch"], exact_step)
    cost = _BACKWARD_COSTS[operator]()
    if forward_too:
        forward = LAYER_OPERATORS[operator].cost(LAYER_ROWS, LAYER_WIDTH, torch.float32)
        if operator == "score_candidates":
            forward = score_candidates_cost(LAYER_ROWS, 1, LAYER_WIDTH, torch.float32)
        cost = forward.and_then(cost)
    return Prepared(
        {name: Contender(mode_call(functions[name], step, forward_too=forward_too)) for name in names},
        lambda name, result: checked(relative_error(result, exact), torch.float32, name),
        cost,
    )


CASES = (
    *(
        attention_case(
            shape,
            dtype,
            long=dtype == torch.bfloat16 and shape != HEADLINE,
            quick=QUICK_RIVALS if (shape, dtype) == (HEADLINE, torch.float32) else (),
        )
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ),
    attention_case(HEADLINE, torch.float32, COMPILED, variant="compiled", long=True),
    training_case(STEP, forward_too=False),
    training_case(STEP, forward_too=True),
    training_case(QUICK_STEP, forward_too=True, quick=("einsum-concatenated",)),
    training_case(LONG_STEP, forward_too=True, long=True),
    training_case(
        STEP, forward_too=True, rivals=("einsum-concatenated", "einsum-compiled"), variant="compiled", long=True
    ),
    *(
        layer_case(operator, quick=("pytorch",) if operator == "score_candidates" else ())
        for operator in LAYER_OPERATORS
    ),
    *(
        layer_case(operator, ("pytorch", "pytorch-compiled"), variant="compiled", long=True)
        for operator in LAYER_OPERATORS
    ),
    *(
        layer_training_case(operator, forward_too=forward_too)
        for operator in LAYER_OPERATORS
        for forward_too in (False, True)
    ),
)
