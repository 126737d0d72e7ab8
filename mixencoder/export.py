"""Export a MixEncoder as ONNX graphs, so that it ranks without PyTorch: `export_onnx`, called by ``mixencoder export``.

Three graphs do what `encode_document`, `encode_query` and `interact` do, from token ids on; every size is dynamic. The
attention in them is written in plain PyTorch here, as exporters know none of this library's operators.
"""

import copy
import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixencoder.base.inputs import local_path
from mixencoder.base.modeling import full_scores
from mixencoder.durable import write_folder
from mixencoder.errors import CheckpointError, InputError, MissingExtraError
from mixencoder.fast import MixEncoder
from mixencoder.modeling import Attend, MixEncoderModel

SETTINGS = "mixencoder.json"
"""File beside the graphs: special tokens, limits and sizes."""
GRAPHS = ("encode_document", "encode_query", "score")
_OPSET = 20
_TOKENIZER = "tokenizer.json"


def export_onnx(engine: MixEncoder, directory: str | Path, *, int8: bool = False) -> float:
    """Write a model's graphs, tokenizer and settings into a directory, compared with the model by onnxruntime.

    - encode_document: input_ids, attention_mask (N, n) int64 -> contexts (N, k, d).
    - encode_query: input_ids, attention_mask (B, m) int64 -> keys_i, values_i (B, m, H, D) of interaction layer i,
      then pooled and first (B, d), each only if the model reads it.
    - score: query_mask (B, m) int64, contexts, and the outputs of encode_query -> scores (B, N).

    Args:
        engine: a float32 model with a ranking head.
        directory: where to write; other files in it stay.
        int8: quantise weights to int8 (onnxruntime's dynamic quantisation), which changes scores.

    Returns:
        The largest difference between scores of the graphs and of the model, over texts of random tokens.

    Raises:
        MissingExtraError: the packages of the extra "onnx" are not installed.
        InputError: the model has no ranking head, another dtype, or a tokenizer without tokenizer.json.
        CheckpointError: the directory cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtraError(f"ONNX needs the extra: pip install 'mixencoder[onnx]' ({error})") from error
    engine.model.check_head("ranking")
    if engine.dtype != torch.float32:
        raise InputError(f"the model's dtype is {engine.dtype}; load it in float32 to export it")
    if not getattr(engine.tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer is a {type(engine.tokenizer).__name__}, which has no {_TOKENIZER}")
    model = engine.model if engine.device.type == "cpu" else copy.deepcopy(engine.model).to("cpu")

    def write(folder: Path) -> None:
        for name, (module, inputs, outputs) in _graphs(model).items():
            path = folder / f"{name}.onnx"
            _export(module, inputs, outputs, path)
            if int8:
                with _quiet_logging():
                    quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
        engine.tokenizer.backend_tokenizer.save(str(folder / _TOKENIZER))
        settings = json.dumps(_settings(engine, int8=int8), indent=2)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")

    try:
        write_folder(local_path(directory), write)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    sessions = {name: onnxruntime.InferenceSession(local_path(directory) / f"{name}.onnx") for name in GRAPHS}
    return max(_difference(model, sessions, *sizes) for sizes in ((1, 1, 3, 3), (2, 9, 5, 17), (3, 16, 33, 24)))


class _EncodeDocument(nn.Module):
    """`MixEncoderModel.encode_document` as a module."""

    def __init__(self, model: MixEncoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return contexts."""
        return self.model.encode_document(input_ids, attention_mask)


class _EncodeQuery(nn.Module):
    """`MixEncoderModel.encode_query` as a module with several outputs."""

    def __init__(self, model: MixEncoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return keys, values, and what else the model reads of a query."""
        state = self.model.read_query(input_ids, attention_mask)
        pooled = state.pooled
        if self.model.query_adapter is not None:
            # all queries at once; encode_query takes one after the other, which no graph of dynamic size can
            pooled = self.model.query_adapter(pooled)
        others = [vector for vector in (pooled, state.first) if vector is not None]
        return (*state.keys, *state.values, *others)


class _Score(nn.Module):
    """`MixEncoderModel.interact` as a module, with attention in plain PyTorch."""

    def __init__(self, model: MixEncoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, query_mask: Tensor, contexts: Tensor, *state: Tensor) -> Tensor:
        """Return scores (B, N)."""
        config, count = self.model.config, len(self.model.interaction)
        others = list(state[2 * count :])
        pooled = others.pop(0).unsqueeze(1) if config.dual_term else None
        first = None if config.state_row else others.pop(0).unsqueeze(1)
        # (B, 1, 1, m): added to the logits
        bias = (1.0 - query_mask[:, None, None].to(contexts.dtype)) * torch.finfo(contexts.dtype).min
        attends: list[Attend] = [partial(_attend, state[i], state[count + i], bias) for i in range(count)]
        h, e = self.model.run_interaction(contexts.unsqueeze(0), attends, first)
        return full_scores(self.model.rank_head(h, e, pooled, contexts.mean(dim=-2)))


def _attend(
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`Attend` by products and a softmax: key, value (B, m, H, D), bias (B, 1, 1, m), contexts (B or 1, N, k, H, D)."""
    _, n, k, _, size = context_query.shape
    # (B, H, D, m), (B, H, m, D)
    shared_key, shared_value = key.permute(0, 2, 3, 1), value.transpose(1, 2)

    def logits(rows: Tensor) -> Tensor:
        # (B or 1, N, r, H, D) -> (B, H, N * r, m)
        return (rows * size**-0.5).flatten(1, 2).transpose(1, 2) @ shared_key + bias

    shared = logits(context_query)
    # (B or 1, H, N, k, k)
    own = context_query.permute(0, 3, 1, 2, 4) * size**-0.5 @ context_key.permute(0, 3, 1, 4, 2)
    own = own.flatten(2, 3).expand(shared.shape[0], -1, -1, -1)
    weights = torch.cat([shared, own], dim=-1).softmax(dim=-1)
    attended = (weights[..., :-k] @ shared_value).unflatten(2, (n, k))
    attended = attended + weights[..., -k:].unflatten(2, (n, k)) @ context_value.permute(0, 3, 1, 2, 4)
    context = attended.permute(0, 2, 3, 1, 4)
    if state_query is None:
        return context, None
    state = logits(state_query.unsqueeze(2)).softmax(dim=-1) @ shared_value
    return context, state.transpose(1, 2)


_Graph = tuple[nn.Module, Mapping[str, tuple[Tensor, Mapping[int, str]]], list[str]]
"""Module; for each input an example and the names of its dynamic dimensions; names of outputs."""


def _graphs(model: MixEncoderModel) -> dict[str, _Graph]:
    """Return the three graphs by name."""
    names = _state_names(model)
    tokens = torch.arange(5, 15).view(2, 5) % model.config.backbone_config.vocab_size
    mask = torch.ones_like(tokens)
    query = {"input_ids": (tokens, {0: "queries", 1: "tokens"}), "attention_mask": (mask, {0: "queries", 1: "tokens"})}
    texts = {"input_ids": (tokens, {0: "texts", 1: "tokens"}), "attention_mask": (mask, {0: "texts", 1: "tokens"})}
    with torch.no_grad():
        state = _EncodeQuery(model)(tokens, mask)
        contexts = model.encode_document(tokens, mask).repeat(2, 1, 1)[:3]
    score = {"query_mask": (mask, {0: "queries", 1: "tokens"}), "contexts": (contexts, {0: "candidates"})}
    for name, tensor in zip(names, state, strict=True):
        # an exporter keeps the strides of an example
        score[name] = (tensor.contiguous(), {0: "queries", 1: "tokens"} if tensor.dim() == 4 else {0: "queries"})
    return {
        "encode_document": (_EncodeDocument(model), texts, ["contexts"]),
        "encode_query": (_EncodeQuery(model), query, names),
        "score": (_Score(model), score, ["scores"]),
    }


def _state_names(model: MixEncoderModel) -> list[str]:
    """Return the names of the outputs of encode_query."""
    layers = range(len(model.interaction))
    names = [f"{kind}_{layer}" for kind in ("keys", "values") for layer in layers]
    return names + ["pooled"] * model.config.dual_term + ["first"] * (not model.config.state_row)


def _export(
    module: nn.Module, inputs: Mapping[str, tuple[Tensor, Mapping[int, str]]], outputs: list[str], path: Path
) -> None:
    examples = tuple(tensor for tensor, _ in inputs.values())
    shapes: list[Any] = [dict(dimensions) for _, dimensions in inputs.values()]
    variadic = isinstance(module, _Score)
    with warnings.catch_warnings(), torch.no_grad():
        # of the exporter, about itself
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            examples,
            path,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=(*shapes[:2], tuple(shapes[2:])) if variadic else tuple(shapes),
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _quiet_logging() -> Generator[None]:
    """Leave out onnxruntime's advice, which it gives to the root logger for every graph."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _settings(engine: MixEncoder, *, int8: bool) -> dict[str, Any]:
    """Return what a program needs beside the graphs."""
    prefix, suffix = engine.read_query.special_tokens()
    config = engine.config
    return {
        "format": 1,
        "prefix": prefix,
        "suffix": suffix,
        "pad": engine.tokenizer.pad_token_id or 0,
        "max_query_tokens": engine.read_query.max_length,
        "max_document_tokens": engine.read_document.max_length,
        "query_truncation_side": engine.read_query.truncation_side,
        "state": _state_names(engine.model),
        "context_shape": list(engine.model.context_shape),
        "calibration": config.calibration,
        "int8": int8,
        "versions": {name: version(name) for name in ("mixencoder", "torch", "transformers", "onnx")},
    }


def _difference(
    model: MixEncoderModel, sessions: Mapping[str, Any], queries: int, query_tokens: int, texts: int, tokens: int
) -> float:
    """Return the largest difference between scores of the graphs and of the model, for random tokens of these sizes."""
    generator = torch.Generator().manual_seed(queries)
    vocabulary = model.config.backbone_config.vocab_size

    def batch(rows: int, width: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(vocabulary, (rows, width), generator=generator)
        lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
        lengths[0] = width
        return ids, (torch.arange(width) < lengths).long()

    def run(name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        wanted = {entry.name for entry in sessions[name].get_inputs()}
        return sessions[name].run(None, {key: value for key, value in inputs.items() if key in wanted})

    (query, query_mask), (document, document_mask) = batch(queries, query_tokens), batch(texts, tokens)
    (contexts,) = run("encode_document", input_ids=document.numpy(), attention_mask=document_mask.numpy())
    names = [entry.name for entry in sessions["encode_query"].get_outputs()]
    state = run("encode_query", input_ids=query.numpy(), attention_mask=query_mask.numpy())
    found = dict(zip(names, state, strict=True))
    (scores,) = run("score", query_mask=query_mask.numpy(), contexts=contexts, **found)
    with torch.no_grad():
        encoded = model.encode_document(document, document_mask)
        expected = full_scores(model.interact(model.encode_query(query, query_mask), encoded, "ranking"))
    return float(np.abs(scores - expected.numpy()).max())
