"""The interaction stack without gradients, for one piece of candidates of fixed shape and one query at a time.

The same mathematics as `mixencoder.modeling.InteractionLayer`, arranged for speed: what is stored is not computed
again, contexts and state of a candidate lie side by side so that W_o and the FFN are one product each, everything
between the products happens in place in memory that is kept. `mixencoder.ranking.streaming` is the only caller.

On a CPU, `FusedLayers`: attention is two batched products and a softmax over the m + k keys of a row. Elsewhere, and
where the processor multiplies bfloat16 itself, `OperatorLayers`: the operators of `mixkernels`.
`mixencoder.ranking.streaming` tries in which sizes of piece a candidate's bits do not depend on its place
(docs/determinism.md).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixencoder.errors import InputError
from mixencoder.modeling import InteractionLayer, MixEncoderModel, QueryState
from mixencoder.ranking.feed_forward import FloatFeedForward, QuantisedFeedForward
from mixencoder.ranking.linear import Linear, QuantisedLinear, elementwise
from mixencoder.ranking.record_format import mean_over_contexts
from mixencoder.ranking.workspace import Workspace
from mixkernels import candidate_attention, gate_layer_norm, residual_layer_norm, score_candidates
from mixkernels.devices import multiplies_natively

_EPSILON = 1e-8
"""Least length of a vector in a cosine, as in PyTorch's."""

_WIDTH = 8
"""Keys of a row come in multiples of this: MKL's products with 5 to 7 or 9 to 11 columns round by the row's place, and
softmax runs over whole vectors."""

_FEW_CONTEXTS = 4
"""Up to so many contexts, own keys are met by elementwise products, k passes; products of k x k have more overhead."""


class Inputs(NamedTuple):
    """What a layer reads of C candidates; None where the model has no such thing."""

    context: Tensor | None
    """(C, k, d), what the residual adds to the context rows."""
    queries: Tensor
    """(C, rows, d): the contexts' queries, then the state's, side by side."""
    value: Tensor | None
    """(C, k, d), own values."""
    own_logits: Tensor | None
    """(C, k, k, H), scaled."""
    gate: Tensor | None
    """(C, d), the hint's part of the gate, with its bias."""


class Query(NamedTuple):
    """One query as the layers read it: for every layer keys and values, and its vectors for the head."""

    length: int
    """m, its tokens, or how many there is room for."""
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    first: Tensor | None
    """(d,), h of a model without state row."""
    direction: Tensor | None
    """(d,), the pooled query at length 1; only with the dual term."""
    lengths: Tensor | None = None
    """(1,) int64, its tokens where there is room for more; None where there is not."""

    def empty(self, length: int) -> "Query":
        """Return room for a query like this of up to `length` tokens, for layers that take (1, m, H, D)."""
        keys, values = (
            tuple(part.new_zeros(1, length, *part.shape[2:]) for part in parts) for parts in (self.keys, self.values)
        )
        first, direction = (
            None if vector is None else torch.empty_like(vector) for vector in (self.first, self.direction)
        )
        return Query(length, keys, values, first, direction, torch.zeros(1, dtype=torch.int64, device=keys[0].device))

    def take(self, query: "Query") -> None:
        """Become a query, which must fit: in the same memory."""
        for room, part in zip((*self.keys, *self.values), (*query.keys, *query.values), strict=True):
            room[:, : query.length].copy_(part)
        for room, vector in ((self.first, query.first), (self.direction, query.direction)):
            if room is not None:
                room.copy_(vector)
        self.lengths.fill_(query.length)


class Layers:
    """The interaction layers of a model, prepared for inference in `dtype`.

    Weights are read where they are if the model has that dtype; else they are copied once, here.

    Args:
        model: the model, in inference mode.
        products: "native"; "bfloat16"; or "int8" for int8 products (`mixencoder.ranking.linear`) of all that depends on
            the query but the attention itself.

    Raises:
        InputError: the device has no such products.
    """

    def __init__(self, model: MixEncoderModel, products: str = "native") -> None:
        self.model = model
        self.device = model.device
        self.dtype = _dtype_of(model, products)
        self.k, self.d = model.context_shape
        self.has_state, self.updates_context = model.config.state_row, model.config.context_update
        self.contexts = self.k if self.updates_context else 0
        self.rows = self.contexts + self.has_state
        """Rows a candidate in the products."""
        self.heads = model.config.backbone_config.num_attention_heads
        self.head_dim = self.d // self.heads
        quantised = products == "int8"
        self.layers = [_Layer(layer, self.dtype, quantised) for layer in model.interaction_layers]
        if self.has_state:
            # (d, d) each: what multiplies the hint (with the bias), the update, the state
            weights = [weight.t() for weight in model.gate.weight.to(self.dtype).split(self.d, dim=1)]
            self.gate_hint = Linear(weights[0], model.gate.bias.to(self.dtype))
            self.gate_update, self.gate_state = (_product(Linear(weight, None), quantised) for weight in weights[1:])

    def query(self, query_state: QueryState, number: int) -> Query:
        """Prepare one query of a state."""
        state = query_state.select(number)
        direction = None
        if state.pooled is not None:
            pooled = state.pooled[0].to(torch.promote_types(self.dtype, torch.float32))
            direction = pooled / pooled.norm().clamp_min(_EPSILON)
        keys, values = self._keys_and_values(state)
        first = None if state.first is None else state.first[0].to(self.dtype)
        return Query(int(state.lengths), keys, values, first, direction)

    def width(self, length: int) -> int:
        """Return a query length that stands for this one: their products have one shape."""
        return length

    def project(self, workspace: Workspace, number: int, context: Tensor | None, hint: Tensor) -> Inputs:
        """Compute what layer `number` reads of contexts (C, k, d) and hints (C, d).

        What the first layer reads stays as it is while deeper ones are projected: all queries meet it.
        """
        layer, count = self.layers[number], len(hint)
        place = "first" if number == 0 else "deeper"
        queries = workspace.take(f"{place} queries", count, self.rows, self.d)
        value = own_logits = gate = None
        if self.contexts:
            rows = context if context.is_contiguous() else workspace.take("contexts", *context.shape).copy_(context)
            rows = rows.view(-1, self.d)
            names = ("key", f"{place} value", "query")
            key, value, query = (workspace.take(name, count, self.k, self.d) for name in names)
            for linear, out in ((layer.query, query), (layer.key, key), (layer.value, value)):
                linear.into(workspace, out.view(-1, self.d), rows)
            queries[:, : self.k] = query
            own_logits = self._own_logits(workspace, place, query, key)
        if self.has_state:
            layer.state_query.into(workspace, queries[:, self.contexts], hint)
            gate = workspace.take(f"{place} gate hint", count, self.d)
            self.gate_hint.into(workspace, gate, hint)
        return Inputs(context, queries, value, own_logits, gate)

    def interact(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> Tensor:
        """``h . e`` (C,) of candidates, whose first layer's inputs are given, for one query; hint is (C, d)."""
        h, e = self.vectors(workspace, inputs, hint, query)
        return torch.mul(h, e, out=workspace.take("product", len(hint), self.d)).sum(dim=-1)

    def vectors(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> tuple[Tensor, Tensor]:
        """H and e, (C, d) each, of what `interact` multiplies; valid until the workspace is used again."""
        # out: (C, rows, d) of the layer before
        count, out, state = len(hint), None, None
        for number in range(len(self.layers)):
            if out is not None:
                context = out[:, : self.k] if self.contexts else None
                hint = hint if context is None else mean_over_contexts(context)
                state = out[:, -1] if self.has_state else None
                inputs = self.project(workspace, number, context, hint)
            out = self._layer(workspace, number, inputs, state, query)
        h = out[:, -1] if self.has_state else query.first.expand(count, self.d)
        return h, mean_over_contexts(out[:, : self.k]) if self.contexts else hint

    def dual_lengths(self, hint: Tensor) -> Tensor:
        """Lengths (C,) of the pooled candidates (C, d), as `dual` divides by them."""
        wide = hint.to(torch.promote_types(hint.dtype, torch.float32))
        return (wide * wide).sum(dim=-1).sqrt_().clamp_min_(_EPSILON)

    def dual(self, workspace: Workspace, hint: Tensor, lengths: Tensor, query: Query) -> Tensor:
        """The dual term (C,) of pooled candidates (C, d) with their lengths."""
        product = workspace.take("product", *hint.shape, dtype=query.direction.dtype)
        cosine = torch.mul(hint, query.direction, out=product).sum(dim=-1).div_(lengths)
        return cosine.mul_(self.model.dual_scale)

    def _keys_and_values(self, state: QueryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        raise NotImplementedError

    def _layer(self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query) -> Tensor:
        """Contexts and states after a layer, (C, rows, d)."""
        raise NotImplementedError

    def _own_logits(self, workspace: Workspace, place: str, query: Tensor, key: Tensor) -> Tensor:
        """Scaled logits (C, k, k, H) of contexts with their candidate's contexts, both (C, k, d)."""
        count, scale = len(query), 1 / math.sqrt(self.head_dim)
        query, key = (part.unflatten(-1, (self.heads, self.head_dim)) for part in (query, key))
        if self.k > _FEW_CONTEXTS:
            own = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))
            return own.mul_(scale).permute(0, 2, 3, 1)
        own = workspace.take(f"{place} own logits", count, self.k, self.k, self.heads)
        product = workspace.take("own product", count, self.k, self.heads, self.head_dim)
        for number in range(self.k):
            torch.mul(query, key[:, number : number + 1], out=product)
            torch.sum(product, dim=-1, out=own[:, :, number])
        return own.mul_(scale)


class FusedLayers(Layers):
    """For a CPU: batched products of PyTorch's, in memory that is kept."""

    def width(self, length: int) -> int:
        """As `Layers.width`: room for own keys and for whole vectors is part of the products."""
        return math.ceil((length + self.contexts) / _WIDTH) * _WIDTH - self.contexts

    def _keys_and_values(self, state: QueryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For every layer scaled keys (H, D, width) and values (H, width, D), zero from m on: room for own keys."""
        keys, values = [], []
        length = int(state.lengths)
        room = self.width(length) + self.contexts - length
        for key, value in zip(state.keys, state.values, strict=True):
            scaled = key[0].to(self.dtype) / math.sqrt(self.head_dim)
            keys.append(F.pad(scaled.permute(1, 2, 0), (0, room)).contiguous())
            values.append(F.pad(value[0].to(self.dtype).transpose(0, 1), (0, 0, 0, room)).contiguous())
        return tuple(keys), tuple(values)

    def _layer(self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query) -> Tensor:
        layer, count, d = self.layers[number], len(inputs.queries), self.d
        attended = self._attend(workspace, inputs, query.length, query.keys[number], query.values[number])
        rows = workspace.take("rows", count, self.rows, d)
        layer.attention_output.into(workspace, rows.view(-1, d), attended)
        if self.contexts:
            rows[:, : self.k].add_(inputs.context)
        if self.has_state:
            self._gate(workspace, rows[:, -1], inputs.gate, state)
        normed = layer.attention_norm(rows.view(-1, d))
        layer.feed_forward.add_into(workspace, normed)
        return layer.output_norm(normed).view(count, self.rows, d)

    def _attend(self, workspace: Workspace, inputs: Inputs, m: int, key: Tensor, value: Tensor) -> Tensor:
        """What rows read of the query's m tokens, and contexts of themselves: (C rows, d)."""
        count, heads, k = len(inputs.queries), self.heads, self.contexts
        total, width = count * self.rows, key.shape[-1]
        logits = workspace.take("logits", heads, total, width)
        torch.bmm(inputs.queries.view(total, heads, self.head_dim).transpose(0, 1), key, out=logits)
        if width > m:
            rest = logits.view(heads, count, self.rows, width)[..., m:].fill_(-math.inf)
            if k:
                rest[:, :, :k, :k] = inputs.own_logits.permute(3, 0, 1, 2)
        probs = torch.softmax(logits, dim=-1, out=workspace.take("probs", heads, total, width))
        by_head = torch.bmm(probs, value, out=workspace.take("by head", heads, total, self.head_dim))
        attended = workspace.take("attended", total, heads, self.head_dim).copy_(by_head.transpose(0, 1))
        if k:
            own = probs.view(heads, count, self.rows, width)[:, :, :k, m : m + k]
            contexts = attended.view(count, self.rows, heads, self.head_dim)[:, :k]
            self._add_own(workspace, contexts, own, inputs.value.unflatten(-1, (heads, self.head_dim)))
        return attended.view(total, self.d)

    def _add_own(self, workspace: Workspace, out: Tensor, probs: Tensor, value: Tensor) -> None:
        """Add to out (C, k, H, D) own values (C, k, H, D), weighted with probs (H, C, k, k)."""
        if self.k > _FEW_CONTEXTS:
            # (C, H, k, k) by (C, H, k, D)
            out.add_(torch.matmul(probs.transpose(0, 1), value.transpose(1, 2)).transpose(1, 2))
            return
        product = workspace.take("own product", *value.shape)
        # (C, k, k, H, 1)
        weights = probs.permute(1, 2, 3, 0).unsqueeze(-1)
        for number in range(self.k):
            # a product and a sum: fused, their rounding would depend on the place
            out.add_(torch.mul(weights[:, :, number], value[:, number : number + 1], out=product))

    def _gate(self, workspace: Workspace, update: Tensor, hint: Tensor, state: Tensor | None) -> None:
        """Gate the update (C, d) in place: ``z*u + (1-z)*h``."""
        gate = self.gate_update.into(workspace, workspace.take("gate", *hint.shape), update, hint)
        if state is None:
            update.mul_(elementwise(torch.sigmoid_, gate))
            return
        self.gate_state.into(workspace, gate, state, gate)
        update.sub_(state).mul_(elementwise(torch.sigmoid_, gate)).add_(state)


class OperatorLayers(Layers):
    """For a GPU, and wherever `mixkernels` has the better attention: its operators, on the model's backend."""

    def interact(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> Tensor:
        """As `Layers.interact`, with the end of a single layer in one operator."""
        if len(self.layers) > 1 or not (self.contexts and self.has_state):
            return super().interact(workspace, inputs, hint, query).float()
        # LN2, the mean, the product and its sum are one operator
        normed, update = self._before_norm(workspace, 0, inputs, None, query)
        norm, contexts, states = self.layers[0].output_norm, slice(0, self.k), -1
        parts = (part[:, rows] for rows in (contexts, states) for part in (update, normed))
        # pyrefly: ignore [no-matching-overload]: parts are four
        return score_candidates(*parts, norm.weight, norm.bias, eps=norm.eps, backend=self.model.kernel_backend)

    def _keys_and_values(self, state: QueryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        keys, values = (tuple(part.to(self.dtype) for part in parts) for parts in (state.keys, state.values))
        return keys, values

    def _layer(self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query) -> Tensor:
        normed, update = self._before_norm(workspace, number, inputs, state, query)
        norm = self.layers[number].output_norm
        return residual_layer_norm(
            update, normed, norm.weight, norm.bias, eps=norm.eps, backend=self.model.kernel_backend
        )

    def _before_norm(
        self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query
    ) -> tuple[Tensor, Tensor]:
        """Rows (C, rows, d) after LN1, and what the FFN makes of them."""
        layer, count, k, d = self.layers[number], len(inputs.queries), self.contexts, self.d
        split = (self.heads, self.head_dim)
        attended = workspace.take("attended", count, self.rows, d)
        queries = inputs.queries.unflatten(-1, split)
        if k:
            own_logits = inputs.own_logits.float()
        else:
            # the operator, which always attends contexts, is given the states as such
            own_logits = torch.full((count, 1, 1, self.heads), -math.inf, dtype=torch.float32, device=self.device)
        result = candidate_attention(
            queries[:, : max(k, 1)],
            None,
            inputs.value.unflatten(-1, split) if k else queries,
            queries[:, -1] if k and self.has_state else None,
            query.keys[number],
            query.values[number],
            key_lengths=query.lengths,
            own_logits=own_logits,
            backend=self.model.kernel_backend,
        )
        attended[:, : max(k, 1)] = result.context[0].flatten(-2)
        if result.state is not None:
            attended[:, -1] = result.state[0].flatten(-2)
        rows = workspace.take("rows", count, self.rows, d)
        layer.attention_output.into(workspace, rows.view(-1, d), attended.view(-1, d))
        norm, normed = layer.attention_norm, workspace.take("normed", count, self.rows, d)
        options = {"eps": norm.eps, "backend": self.model.kernel_backend}
        if k:
            normed[:, :k] = residual_layer_norm(rows[:, :k], inputs.context, norm.weight, norm.bias, **options)
        if self.has_state:
            gate = self.gate_update.into(workspace, workspace.take("gate", count, d), rows[:, -1], inputs.gate)
            if state is not None:
                self.gate_state.into(workspace, gate, state, gate)
            normed[:, -1] = gate_layer_norm(gate, rows[:, -1], state, norm.weight, norm.bias, **options)
        return normed, layer.feed_forward.of(workspace, normed.view(-1, d)).view(normed.shape)


class _Layer:
    """An interaction layer's weights in the dtype of the products."""

    def __init__(self, layer: InteractionLayer, dtype: torch.dtype, quantised: bool) -> None:
        def linear(module: nn.Linear) -> Linear:
            return Linear(module.weight.to(dtype).t(), module.bias.to(dtype))

        projections: Mapping[str, Linear] = {
            name: linear(getattr(layer, name))
            for name in ("query", "key", "value", "state_query")
            if hasattr(layer, name)
        }
        self.__dict__.update(projections)
        self.attention_output = _product(linear(layer.attention_output), quantised)
        self.attention_norm, self.output_norm = (
            _Norm(norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
            for norm in (layer.attention_norm, layer.output_norm)
        )
        feed_forward = QuantisedFeedForward if quantised else FloatFeedForward
        self.feed_forward = feed_forward(linear(layer.intermediate), linear(layer.output), layer.activation)


def _product(linear: Linear, quantised: bool) -> Linear | QuantisedLinear:
    return QuantisedLinear(linear) if quantised else linear


class _Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)


def prepared(model: MixEncoderModel, products: str = "native") -> Layers:
    """Prepare a model's interaction layers, in the way that suits its device and dtype; products as in `Layers`.

    Raises:
        InputError: the device has no such products.
    """
    on_operators = model.device.type != "cpu" or model.kernel_backend not in ("auto", "torch")
    narrow = _dtype_of(model, products) in (torch.float16, torch.bfloat16)
    return (OperatorLayers if on_operators or narrow else FusedLayers)(model, products)


def _dtype_of(model: MixEncoderModel, products: str) -> torch.dtype:
    """The dtype of products: emulated ones in a narrow dtype are no faster than float32, and never taken.

    Raises:
        InputError: they should be bfloat16, which the processor does not multiply itself.
    """
    wanted = torch.bfloat16 if products == "bfloat16" else model.dtype
    native = multiplies_natively(wanted, model.device)
    if products == "bfloat16" and not native:
        raise InputError(
            'products "bfloat16" cannot run here: this processor does not multiply bfloat16 itself; products "native" '
            'run everywhere, "int8" on any CPU with oneDNN'
        )
    return wanted if native else torch.float32
