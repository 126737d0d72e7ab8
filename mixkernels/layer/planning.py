"""Check calls of the layer's operators and decide how they run; decisions are kept by form (`mixkernels.plans`).

A plan is a function of a call's tensors, eps and out. Without gradients and where PyTorch need not see an operator
(`mixkernels.plans.intercepted`), it calls the backend itself, on Triton with a launch that is prepared.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixkernels.dispatch import implementation, select_backend
from mixkernels.errors import BackendError, ShapeError
from mixkernels.layer import reference as reference_layer
from mixkernels.layer import torch_operators as torch_layer
from mixkernels.layer.autograd import GateLayerNorm, ResidualLayerNorm, ScoreCandidates
from mixkernels.layer.checks import check_ranking, checked_additive, checked_rows, expanded
from mixkernels.layer.registration import (
    GATE_LAYER_NORM,
    RESIDUAL_LAYER_NORM,
    SCORE_CANDIDATES,
    SCORE_TOP_K,
    dense_inputs,
    run_gate_layer_norm,
    run_residual_layer_norm,
    run_score_candidates,
    run_score_top_k,
)
from mixkernels.outputs import check_apart, check_no_gradients, check_out
from mixkernels.plans import Plans
from mixkernels.tensors import needs_grad

Form = tuple[Any, ...] | None
Given = tuple[Any, ...]
RowsRun = Callable[[Given, float, Tensor | None], Tensor]
ScoresRun = Callable[[Given, tuple[Tensor, ...], float, int, Any], Any]

RESIDUAL_PLANS, GATE_PLANS, SCORE_PLANS = Plans(), Plans(), Plans()
RESIDUAL_NAMES = ("x", "residual", "weight", "bias")
GATE_NAMES = ("gate", "update", "state", "weight", "bias")
SCORE_NAMES = ("context", "context_residual", "state", "state_residual", "weight", "bias", "additive")

# modules, not `mixkernels.dispatch.implementation`: torch.compile does not trace an import
_DIFFERENTIABLE = {"reference": reference_layer, "torch": torch_layer}


def _placed(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _check_row_out(out: Tensor | None, like: Tensor, inputs: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Check `out` of an operator whose result is like this tensor.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as the message says.
    """
    if out is None:
        return
    check_out("out", out, like.shape, like.dtype, like.device)
    check_no_gradients(out, *inputs, out)
    if not torch.compiler.is_compiling():
        check_apart((out,), inputs, names)


# -- residual ----------------------------------------------------------------------------------------------------------


def plan_residual(form: Form, given: Given, backend: str | None, out: Tensor | None) -> RowsRun:
    """Check a call of `residual_layer_norm` and return what runs it; kept by form, unless that is None.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as the operator.
    """
    x, residual, weight, bias = given
    rows = checked_rows("x", {"x": x, "residual": residual}, weight, bias)
    inputs = (rows["x"], expanded("residual", rows["residual"], "x", rows["x"]), weight, bias)
    name = select_backend(backend, *inputs, operator="residual_layer_norm")
    _check_row_out(out, rows["x"], inputs, RESIDUAL_NAMES)
    recorded = needs_grad(*inputs)
    if form is None:
        return lambda given, eps, out: _placed(_residual(inputs, eps, name, recorded), out)
    kept = True
    if name == "triton" and not recorded:
        run, kept = implementation("layer", "triton", "residual_runner")(*inputs, out)
    else:
        shape = rows["x"].shape

        def run(given: Given, eps: float, out: Tensor | None) -> Tensor:
            x, residual, weight, bias = given
            inputs = (x, residual.expand(shape), weight, bias)
            if recorded:
                return _residual(inputs, eps, name, recorded)
            return _placed(run_residual_layer_norm(*inputs, eps, name), out)

    if kept:
        RESIDUAL_PLANS.remember(form, run)
    return run


def _residual(inputs: tuple[Tensor, ...], eps: float, name: str, recorded: bool) -> Tensor:
    if not recorded:
        return RESIDUAL_LAYER_NORM(*inputs, eps, name)
    if name == "triton":
        return ResidualLayerNorm.apply(*inputs, eps)
    return _DIFFERENTIABLE[name].residual_layer_norm(*inputs, eps=eps)


# -- gate --------------------------------------------------------------------------------------------------------------


def plan_gate(form: Form, given: Given, backend: str | None, out: Tensor | None) -> RowsRun:
    """As `plan_residual`, of `gate_layer_norm`."""
    gate, update, state, weight, bias = given
    named = {"gate": gate, "update": update} if state is None else {"gate": gate, "update": update, "state": state}
    rows = checked_rows("update", named, weight, bias)
    gate, update, state = rows["gate"], rows["update"], rows.get("state")
    if gate.shape != update.shape:
        raise ShapeError(f"gate has shape {tuple(gate.shape)}; expected {tuple(update.shape)}, the shape of update")
    if state is not None:
        state = expanded("state", state, "update", update)
    inputs = (gate, update, state, weight, bias)
    given_ones = (update, gate, weight, bias) if state is None else (update, gate, weight, bias, state)
    name = select_backend(backend, *given_ones, operator="gate_layer_norm")
    _check_row_out(out, update, inputs, GATE_NAMES)
    recorded = needs_grad(*inputs)
    if form is None:
        return lambda given, eps, out: _placed(_gate(inputs, eps, name, recorded), out)
    kept = True
    if name == "triton" and not recorded:
        fused, kept = implementation("layer", "triton", "gate_runner")(*inputs, out)
        run = fused
        if state is None:
            # nothing is read through the pointer of the state
            def run(given: Given, eps: float, out: Tensor | None) -> Tensor:
                gate, update, _, weight, bias = given
                return fused((gate, update, update, weight, bias), eps, out)
    else:
        shape = update.shape

        def run(given: Given, eps: float, out: Tensor | None) -> Tensor:
            gate, update, state, weight, bias = given
            inputs = (gate, update, None if state is None else state.expand(shape), weight, bias)
            if recorded:
                return _gate(inputs, eps, name, recorded)
            return _placed(run_gate_layer_norm(*inputs, eps, name), out)

    if kept:
        GATE_PLANS.remember(form, run)
    return run


def _gate(inputs: Given, eps: float, name: str, recorded: bool) -> Tensor:
    if not recorded:
        return GATE_LAYER_NORM(*inputs, eps, name)
    if name == "triton":
        return GateLayerNorm.apply(*inputs, eps)
    return _DIFFERENTIABLE[name].gate_layer_norm(*inputs, eps=eps)


# -- scores ------------------------------------------------------------------------------------------------------------


def plan_scores(
    form: Form,
    given: Given,
    backend: str | None,
    top_k: int | None,
    running: tuple[Tensor, Tensor] | None,
    first_id: int,
    out: Any,
) -> ScoresRun:
    """As `plan_residual`, of `score_candidates`; the plan also takes running scores and ids (or none) and first_id."""
    *named, weight, bias, additive = given
    rows = checked_rows("state", dict(zip(SCORE_NAMES, named, strict=False)), weight, bias)
    context, state = rows["context"], rows["state"]
    if context.dim() not in (3, 4) or context.shape[-2] < 1:
        raise ShapeError(f"context has shape {tuple(context.shape)}; expected (B, N, k, d) or (N, k, d), k at least 1")
    if state.shape != context.shape[:-2] + context.shape[-1:]:
        raise ShapeError(
            f"state has shape {tuple(state.shape)}; expected {tuple(context.shape[:-2] + context.shape[-1:])}, because "
            f"context has {tuple(context.shape)}"
        )
    context_residual = expanded("context_residual", rows["context_residual"], "context", context)
    state_residual = expanded("state_residual", rows["state_residual"], "state", state)
    additive = checked_additive(additive, state)
    check_ranking(top_k, running, first_id, state)
    tensors = (context, context_residual, state, state_residual, weight, bias)
    inputs = tensors if additive is None else (*tensors, additive)
    # the dtype and device of state decide
    name = select_backend(backend, state, *inputs, operator="score_candidates")
    _check_score_out(out, state, inputs, top_k, running)
    recorded = needs_grad(*inputs)
    if recorded and top_k is not None:
        raise BackendError(
            "top_k is for inference, but an input requires a gradient; call under torch.no_grad(), or leave top_k out "
            "to differentiate the scores"
        )
    if form is None:
        # under autocast these are casts
        cast = (*tensors, additive)
        return lambda given, before, eps, first_id, out: _scores(
            cast, before, eps, first_id, out, name, top_k, recorded, dispatched=True
        )
    kept = True
    if name == "triton" and not recorded:
        run, kept = _fused_scores((*tensors, additive), top_k, out)
    else:
        shapes = context.shape, state.shape

        def run(given: Given, before: tuple[Tensor, ...], eps: float, first_id: int, out: Any) -> Any:
            context, context_residual, state, state_residual, weight, bias, additive = given
            tensors = (context, context_residual.expand(shapes[0]), state, state_residual.expand(shapes[1]))
            additive = None if additive is None else additive.expand(shapes[1][:-1])
            tensors = (*tensors, weight, bias, additive)
            return _scores(tensors, before, eps, first_id, out, name, top_k, recorded, dispatched=False)

    if kept:
        SCORE_PLANS.remember(form, run)
    return run


def _check_score_out(
    out: Any, state: Tensor, inputs: tuple[Tensor, ...], top_k: int | None, running: tuple[Tensor, Tensor] | None
) -> None:
    if out is None:
        return
    wide = torch.promote_types(state.dtype, torch.float32)
    if top_k is None:
        check_out("out", out, state.shape[:-1], wide, state.device)
        outs: tuple[Tensor, ...] = (out,)
    else:
        outs = tuple(out)
        if len(outs) != 2:
            raise ShapeError(f"out holds {len(outs)} tensors; expected 2 with top_k: scores and ids")
        seen = state.shape[-2] + (0 if running is None else running[0].shape[-1])
        shape = (*state.shape[:-2], min(top_k, seen))
        for label, tensor, dtype in zip(("out scores", "out ids"), outs, (wide, torch.int64), strict=True):
            check_out(label, tensor, shape, dtype, state.device)
    check_no_gradients(out, *inputs, *outs)
    if not torch.compiler.is_compiling():
        check_apart(outs, (*inputs, *(running or ())))


def _scores(
    tensors: Given,
    before: tuple[Tensor, ...],
    eps: float,
    first_id: int,
    out: Any,
    name: str,
    top_k: int | None,
    recorded: bool,
    *,
    dispatched: bool,
) -> Any:
    """Run a checked call; dispatched: as one operator of PyTorch."""
    *rows, weight, bias, additive = tensors
    single = rows[0].dim() == 3
    if single:
        rows = [tensor.unsqueeze(0) for tensor in rows]
        additive = None if additive is None else additive.unsqueeze(0)
    inputs: list[Any] = [*rows, weight, bias]
    if top_k is None:
        if not recorded:
            run: Any = SCORE_CANDIDATES if dispatched else run_score_candidates
            scores = run(*inputs, additive, eps, name)
        elif name == "triton":
            scores = ScoreCandidates.apply(*inputs, eps)
            scores = scores if additive is None else scores + additive.float()
        else:
            scores = _DIFFERENTIABLE[name].score_candidates(*inputs, eps=eps, additive=additive)
        return _placed(scores.squeeze(0) if single else scores, out)
    running = [tensor.unsqueeze(0) for tensor in before] if single else list(before)
    running_scores, running_ids = running or (None, None)
    run: Any = SCORE_TOP_K if dispatched else run_score_top_k
    best = run(*inputs, additive, running_scores, running_ids, eps, top_k, first_id, name)
    return _placed_best(best, single, out)


def _placed_best(best: tuple[Tensor, Tensor], single: bool, out: Any) -> tuple[Tensor, Tensor]:
    scores, ids = (tensor.squeeze(0) for tensor in best) if single else best
    return (scores, ids) if out is None else (out[0].copy_(scores), out[1].copy_(ids))


def _fused_scores(tensors: Given, top_k: int | None, out: Any) -> tuple[ScoresRun, bool]:
    """Return what scores calls of a checked form in Triton, and whether it takes tensors as they are."""
    *rows, weight, bias, additive = tensors
    single = rows[0].dim() == 3
    # single queries need a view for the strides only: the launch takes pointers
    batched = [tensor.unsqueeze(0) for tensor in rows] if single else rows
    dense = dense_inputs(*batched, weight, bias)
    kept = all(before is after for before, after in zip((*batched, weight, bias), dense, strict=True))
    per_candidate = additive if additive is None or not single else additive.unsqueeze(0)
    prepared = implementation("layer", "triton", "prepare")(dense, per_candidate, top_k=top_k)
    fixed = None if kept else dense
    if top_k is None:
        if single:
            prepared = prepared._replace(memory=prepared.memory.of_shape(rows[2].shape[:-1]))
        direct = out is None or out.is_contiguous()

        def run(given: Given, before: tuple[Tensor, ...], eps: float, first_id: int, out: Any) -> Tensor:
            *rows, additive = given
            scores = prepared(fixed or rows, eps, additive, first_id, out if direct else None)
            return scores if direct else out.copy_(scores)

        return run, kept
    best_of_runs, candidates = implementation("layer", "triton", "best_of_runs"), rows[2].shape[-2]

    def run_top_k(given: Given, before: tuple[Tensor, ...], eps: float, first_id: int, out: Any) -> Any:
        *rows, additive = given
        keys = prepared(fixed or rows, eps, additive, first_id, None)
        running = [tensor.unsqueeze(0) for tensor in before] if single else list(before)
        running_scores, running_ids = running or (None, None)
        best = best_of_runs(keys, candidates, running_scores, running_ids, top_k)
        return _placed_best(best, single, out)

    return run_top_k, kept
