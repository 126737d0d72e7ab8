"""What an index stores of a candidate, in two layouts and several precisions.

`compact` stores the context embeddings E_0. `projected` stores what the first interaction layer computes without the
query: attention queries, values and own logits of the contexts, the state's query, the hint's part of the gate, and E_0
itself, which the residual and the dual term need (docs/design.md, section 2). Deeper layers are computed during
ranking.

An index stores the tensors of `RecordFormat.encode`. When ranking, `mixencoder.ranking.candidate_buffer` turns them
back into floating point by `RecordFormat.read`.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mixencoder.errors import InputError, NonFiniteError
from mixencoder.index.schema import Field, Schema
from mixencoder.modeling import MixEncoderModel

LAYOUTS = ("projected", "compact")
PRECISIONS = ("float32", "float16", "bfloat16", "int8")

ENCODE_CHUNK = 64
"""Candidates projected at once. Fixed, so that a record does not depend on the candidates encoded with it."""

_LARGEST_INT8 = 127
"""Stored int8 numbers are from -127 to 127."""


class RecordFormat:
    """How candidates of a model are stored: which arrays, in which precision.

    The parts of a record are below; d is H attention heads of size D. A model without state row has no state_query and
    gate. A model without context update stores hint, the mean of E_0, in place of the parts with a dimension k.

    ============= ========= =============================================================
    part          shape     what
    ============= ========= =============================================================
    context       (k, d)    E_0; all that `compact` stores
    context_query (k, d)    W_q E_0
    context_value (k, d)    W_v E_0
    own_logits    (k, k, H) context, own key, attention head; scaled
    state_query   (d,)      W_s g
    gate          (d,)      W_g [g ; 0 ; 0] with the bias
    hint          (d,)      g, the mean of E_0 over k
    ============= ========= =============================================================

    With int8, own_logits is float16. Every other part is int8 numbers times a bfloat16 scale for each row and attention
    head; the scales are a field of their own, whose name ends in ``_scale``.

    Args:
        model: its first interaction layer projects candidates.
        layout: one of `LAYOUTS`.
        precision: one of `PRECISIONS`.

    Raises:
        InputError: layout or precision is unknown.
    """

    def __init__(self, model: MixEncoderModel, layout: str = "projected", precision: str = "float16") -> None:
        if layout not in LAYOUTS:
            raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        self.layout, self.precision = layout, precision
        self._model = model
        k, d = model.context_shape
        heads = self._heads = model.config.backbone_config.num_attention_heads
        shapes: dict[str, tuple[int, ...]] = {"context": (k, d)}
        if layout == "projected":
            if model.config.context_update:
                shapes |= {"context_query": (k, d), "context_value": (k, d), "own_logits": (k, k, heads)}
            else:
                shapes = {"hint": (d,)}
            if model.config.state_row:
                shapes |= {"state_query": (d,), "gate": (d,)}
        self.parts: Mapping[str, tuple[int, ...]] = shapes
        """Name -> shape of every part of a record."""

    @property
    def schema(self) -> Schema:
        """The arrays of a record, in a fixed order."""
        fields = []
        for name, shape in self.parts.items():
            if self.precision != "int8":
                fields.append(Field(name, shape, self.precision))
            elif name == "own_logits":
                fields.append(Field(name, shape, "float16"))
            else:
                fields += [Field(name, shape, "int8"), Field(f"{name}_scale", (*shape[:-1], self._heads), "bfloat16")]
        return Schema(tuple(fields))

    @property
    def has_projection(self) -> bool:
        """Whether a record holds what the first interaction layer computes."""
        return not self.parts.keys() <= {"context", "hint"}

    def without_projection(self) -> "RecordFormat":
        """Return the format that reads of such records only E_0, or its mean."""
        reduced = copy.copy(self)
        reduced.parts = {name: shape for name, shape in self.parts.items() if name in ("context", "hint")}
        return reduced

    def projection_weights(self) -> dict[str, Tensor]:
        """Return the weights that a record depends on besides E_0, by name."""
        layer = self._model.interaction_layers[0]
        names = ("query", "key", "value") if "own_logits" in self.parts else ()
        names = (*names, "state_query") if "state_query" in self.parts else names
        found = {f"{name}.{kind}": getattr(getattr(layer, name), kind) for name in names for kind in ("weight", "bias")}
        if "gate" in self.parts:
            found["gate.weight"], found["gate.bias"] = self._gate_of_hint()
        return found

    @property
    def bytes_per_candidate(self) -> int:
        """Bytes that the arrays take for each candidate."""
        return self.schema.row_bytes

    @torch.no_grad()
    def encode(self, context: Tensor) -> dict[str, Tensor]:
        """Turn context embeddings E_0 (N, k, d) into stored rows.

        Returns:
            For every field of the schema a tensor (N, *shape), contiguous, on the CPU. The bits of a candidate's row do
            not depend on other candidates.

        Raises:
            InputError: context has another shape.
            NonFiniteError: a number is not finite, or too large for the precision.
        """
        expected = self._model.context_shape
        if context.dim() != 3 or context.shape[1:] != expected:
            raise InputError(
                f"context is {tuple(context.shape)}; expected context embeddings (N, {expected[0]}, {expected[1]})"
            )
        rows = {field.name: torch.empty(len(context), *field.shape, dtype=field.torch_dtype)
                for field in self.schema.fields}  # fmt: skip
        for start in range(0, len(context), ENCODE_CHUNK):
            chunk = context[start : start + ENCODE_CHUNK].to(self._model.device, self._model.dtype)
            count = len(chunk)
            if self.layout == "projected":
                chunk = torch.cat([chunk, chunk[-1:].expand(ENCODE_CHUNK - count, -1, -1)])
            for name, part in self._project(chunk).items():
                for suffix, stored in self._stored(name, part[:count]).items():
                    rows[name + suffix][start : start + count] = stored
        for name, stored in rows.items():
            if not stored.dtype.is_floating_point or torch.isfinite(stored).all():
                continue
            raise NonFiniteError(
                f"{name} of {int((~torch.isfinite(stored)).flatten(1).any(dim=1).sum())} of {len(context)} candidates "
                f"is not finite in {self.precision}. The precisions float32 and bfloat16 have the widest range; if "
                "these fail too, the checkpoint or the given embeddings may be damaged"
            )
        return rows

    def read(self, rows: Mapping[str, Tensor], begin: int, end: int, into: Mapping[str, Tensor], first: int) -> None:
        """Copy stored rows begin to end into floating-point tensors, from their row `first` on.

        Args:
            rows: tensors (C, *shape) of the schema's fields.
            begin, end: the stored rows to copy.
            into: name of a part -> tensor (n, *shape) of any floating dtype and device, with any strides between rows;
                only these parts are read.
            first: row of the tensors that stored row `begin` is copied to.
        """
        for name, out in into.items():
            out, stored = out[first : first + end - begin], rows[name][begin:end]
            # PyTorch converts float16 to bfloat16 one number at a time, but both to and from float32 in vectors
            narrow = out.device.type == "cpu" and {out.dtype, stored.dtype} == {torch.float16, torch.bfloat16}
            out.copy_(stored.float() if narrow else stored)
            if stored.dtype == torch.int8:
                scale = rows[f"{name}_scale"][begin:end].to(out.device, out.dtype)
                out.unflatten(-1, (self._heads, -1)).mul_(scale.unsqueeze(-1))

    def _project(self, context: Tensor) -> dict[str, Tensor]:
        """Compute every part (C, *shape) from E_0 (C, k, d)."""
        if self.layout == "compact":
            return {"context": context}
        layer, heads = self._model.interaction_layers[0], self._heads
        hint = mean_over_contexts(context)
        parts = {"context": context, "hint": hint}
        if "own_logits" in self.parts:
            query, key = layer.query(context), layer.key(context)
            wide = torch.promote_types(query.dtype, torch.float32)
            # (C, H, k, D) by (C, H, D, k)
            rows, keys = (part.unflatten(-1, (heads, -1)).transpose(1, 2).to(wide) for part in (query, key))
            own = torch.matmul(rows, keys.transpose(-1, -2)) / math.sqrt(context.shape[-1] // heads)
            parts |= {"context_query": query, "context_value": layer.value(context)}
            parts["own_logits"] = own.permute(0, 2, 3, 1)
        if "gate" in self.parts:
            parts |= {
                "state_query": layer.state_query(hint),
                "gate": torch.nn.functional.linear(hint, *self._gate_of_hint()),
            }
        return {name: parts[name] for name in self.parts}

    def _gate_of_hint(self) -> tuple[Tensor, Tensor]:
        """Return the weights (d, d) of the hint in the gate, and its bias."""
        gate = self._model.gate
        assert gate is not None, "a model with a state row has a gate"
        return gate.weight[:, : gate.out_features], gate.bias

    def _stored(self, name: str, part: Tensor) -> dict[str, Tensor]:
        """Return the fields of a part, by the suffix of their name; int8 parts are scaled and rounded."""
        if self.precision != "int8" or name == "own_logits":
            return {"": part}
        blocks = part.float().unflatten(-1, (self._heads, -1))
        # raised a little, as bfloat16 may round the scale down by up to 2^-8 and the largest number must fit
        scale = (blocks.abs().amax(dim=-1) * ((1 + 2.0**-8) / _LARGEST_INT8)).to(torch.bfloat16)
        step = torch.where(scale == 0, 1.0, scale.float()).unsqueeze(-1)
        return {"": (blocks / step).round().clamp(-_LARGEST_INT8, _LARGEST_INT8).flatten(-2), "_scale": scale}


def mean_over_contexts(context: Tensor) -> Tensor:
    """Return the mean over k of (C, k, d); a view for k = 1.

    Adds one context after the other, as the order of PyTorch's own sum would depend on the number of candidates.
    """
    k, mean = context.shape[1], context[:, 0]
    if k == 1:
        return mean
    mean = mean + context[:, 1]
    for row in range(2, k):
        mean.add_(context[:, row])
    return mean.div_(k)
