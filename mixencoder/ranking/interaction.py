"""The interaction layers without gradients, for one piece of candidates and one query at a time.

Computes the same as `mixencoder.modeling.InteractionLayer`, arranged for speed: stored parts of a candidate are not
computed again; the rows of its contexts and of its state lie side by side, so that W_o and the FFN are one product
each; work between the products is done in place, in memory that is kept (`mixencoder.ranking.workspace`).
`mixencoder.ranking.candidate_buffer` is the caller.

On a CPU, `FusedLayers`: attention is two batched products and a softmax over the m + k keys of a row. On a GPU, and
with a backend other than torch, `OperatorLayers`: operators of `mixkernels`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixencoder.base.linears import Norm, can_pack
from mixencoder.errors import InputError
from mixencoder.modeling import InteractionLayer, MixEncoderModel, QueryState
from mixencoder.ranking.feed_forward import FloatFeedForward, QuantisedFeedForward
from mixencoder.ranking.linear import Linear, PackedLinear, QuantisedLinear, elementwise
from mixencoder.ranking.record_format import mean_over_contexts
from mixencoder.ranking.workspace import Workspace
from mixkernels import candidate_attention, gate_layer_norm, residual_layer_norm, score_candidates
from mixkernels.devices import multiplies_faster, multiplies_natively

_EPSILON = 1e-8
"""Least length of a vector in a cosine, as in PyTorch's."""

_WIDTH = 8
"""The number of keys is padded to a multiple of this. MKL's products with 5 to 7 or 9 to 11 columns do not round alike
in all rows, and softmax rounds differently outside whole vectors of numbers."""

_FEW_CONTEXTS = 4
"""With at most this many contexts, use k elementwise products for own keys; k x k matrix products cost more."""


class Inputs(NamedTuple):
    """A layer's inputs from C candidates; None for parts that the model does not have.

    The k contexts of a candidate attend to the query's tokens and to each other: their "own" keys and values.
    """

    context: Tensor | None
    """(C, k, d), which the residual connection adds to the context rows."""
    queries: Tensor
    """(C, rows, d): the attention queries of the k contexts, then of the state."""
    value: Tensor | None
    """(C, k, d), own values."""
    own_logits: Tensor | None
    """(C, k, k, H), products of the contexts' queries with own keys; scaled."""
    gate: Tensor | None
    """(C, d), the hint's part of the gate, bias included."""


class Query(NamedTuple):
    """One query as the layers read it: keys and values of every layer, and vectors for the ranking head."""

    length: int
    """m, its number of tokens; in memory made by `empty`, the largest number that fits."""
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    first: Tensor | None
    """(d,), h of a model without state row."""
    direction: Tensor | None
    """(d,), the pooled query scaled to length 1; only with the dual term."""
    lengths: Tensor | None = None
    """(1,) int64, the number of tokens in memory made by `empty`; else None."""

    def empty(self, length: int) -> "Query":
        """Return memory for queries of up to `length` tokens with this one's shapes; needs keys (1, m, H, D)."""
        keys, values = (
            tuple(part.new_zeros(1, length, *part.shape[2:]) for part in parts) for parts in (self.keys, self.values)
        )
        first, direction = (
            None if vector is None else torch.empty_like(vector) for vector in (self.first, self.direction)
        )
        return Query(length, keys, values, first, direction, torch.zeros(1, dtype=torch.int64, device=keys[0].device))

    def copy_from(self, query: "Query") -> None:
        """Copy a query that is not longer into this one's memory, which was made by `empty`."""
        for memory, part in zip((*self.keys, *self.values), (*query.keys, *query.values), strict=True):
            memory[:, : query.length].copy_(part)
        for memory, vector in ((self.first, query.first), (self.direction, query.direction)):
            if memory is not None:
                memory.copy_(vector)
        self.lengths.fill_(query.length)


class Layers:
    """The interaction layers of a model, prepared for inference.

    `dtype` is what the products compute in. A model in this dtype shares its weights with the layers, except where
    `PackedLinear` rearranges them; else they are copied once, here.

    Args:
        model: the model, in inference mode.
        products: "native"; "auto"; "bfloat16"; or "int8" (`mixencoder.ranking.linear`) for the products that depend on
            the query, except in the attention.

    Raises:
        InputError: the device cannot compute these products.
    """

    def __init__(self, model: MixEncoderModel, products: str = "native") -> None:
        self.model = model
        self.device = model.device
        self.dtype = _dtype_of(model, products)
        self.k, self.d = model.context_shape
        self.has_state, self.updates_context = model.config.state_row, model.config.context_update
        self.contexts = self.k if self.updates_context else 0
        self.rows = self.contexts + self.has_state
        """Rows of a candidate in the products: its contexts, if they are updated, and the state."""
        self.heads = model.config.backbone_config.num_attention_heads
        self.head_dim = self.d // self.heads
        quantised, packed = products == "int8", can_pack(self.dtype, self.device)
        self.layers = [_Layer(layer, self.dtype, quantised, packed) for layer in model.interaction_layers]
        if self.has_state:
            # (d, d) each, for the hint (with the bias), the update and the state
            weights = [weight.t() for weight in model.gate.weight.to(self.dtype).split(self.d, dim=1)]
            self.gate_hint = _product(Linear(weights[0], model.gate.bias.to(self.dtype)), False, packed)
            self.gate_update, self.gate_state = (
                _product(Linear(weight, None), quantised, packed) for weight in weights[1:]
            )

    def query(self, query_state: QueryState, number: int) -> Query:
        """Prepare query `number` of a state."""
        state = query_state.select(number)
        direction = None
        if state.pooled is not None:
            pooled = state.pooled[0].to(torch.promote_types(self.dtype, torch.float32))
            direction = pooled / pooled.norm().clamp_min(_EPSILON)
        keys, values = self._keys_and_values(state)
        first = None if state.first is None else state.first[0].to(self.dtype)
        return Query(int(state.lengths), keys, values, first, direction)

    def width(self, length: int) -> int:
        """Return the length that the attention pads a query of `length` tokens to; decides the products' shape."""
        return length

    def project(self, workspace: Workspace, number: int, context: Tensor | None, hint: Tensor) -> Inputs:
        """Compute the inputs of layer `number` from contexts (C, k, d) and hints (C, d).

        Those of the first layer have memory of their own, as all queries use them.
        """
        layer, count = self.layers[number], len(hint)
        prefix = "first" if number == 0 else "deeper"
        queries = workspace.take(f"{prefix} queries", count, self.rows, self.d)
        value = own_logits = gate = None
        if self.contexts:
            rows = context if context.is_contiguous() else workspace.take("contexts", *context.shape).copy_(context)
            rows = rows.view(-1, self.d)
            linears = {"query": layer.query, "key": layer.key, f"{prefix} value": layer.value}
            query, key, value = (
                linear.of(workspace, name, rows).view(count, self.k, self.d) for name, linear in linears.items()
            )
            queries[:, : self.k] = query
            own_logits = self._own_logits(workspace, prefix, query, key)
        if self.has_state:
            queries[:, self.contexts] = layer.state_query.of(workspace, "state query", hint)
            gate = self.gate_hint.of(workspace, f"{prefix} gate hint", hint)
        return Inputs(context, queries, value, own_logits, gate)

    def interact(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> Tensor:
        """Return ``h . e`` (C,) for one query and C candidates, given the first layer's inputs and hints (C, d)."""
        h, e = self.vectors(workspace, inputs, hint, query)
        # scores are never summed in half precision
        return self.row_products(workspace, h, e.to(torch.promote_types(self.dtype, torch.float32)))

    def vectors(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> tuple[Tensor, Tensor]:
        """Return h and e, (C, d) each, which `interact` multiplies; valid until the workspace is used again."""
        # out: the previous layer's result, (C, rows, d)
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

    def row_products(self, workspace: Workspace, rows: Tensor, others: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the inner products (C,) of rows (C, d) with others, (C, d) or (d,), whose dtype is the result's.

        Every row is summed alone, so its bits do not depend on the number of rows; those of a matrix product would.
        """
        product = torch.mul(rows, others, out=workspace.take("product", *rows.shape, dtype=others.dtype))
        return product.sum(dim=-1) if out is None else torch.sum(product, dim=-1, out=out)

    def dual_scores(self, products: Tensor, squares: Tensor) -> Tensor:
        """Return dual terms of pooled candidates: products (..., C) with `Query.direction`, squared lengths (C,).

        May write into products.
        """
        return products.div_(squares.sqrt().clamp_min_(_EPSILON)).mul_(self.model.dual_scale)

    def _keys_and_values(self, state: QueryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        raise NotImplementedError

    def _layer(self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query) -> Tensor:
        """Return contexts and states after layer `number`, (C, rows, d)."""
        raise NotImplementedError

    def _own_logits(self, workspace: Workspace, prefix: str, query: Tensor, key: Tensor) -> Tensor:
        """Return scaled logits (C, k, k, H) between the contexts of each candidate; query and key are (C, k, d)."""
        count, scale = len(query), 1 / math.sqrt(self.head_dim)
        query, key = (part.unflatten(-1, (self.heads, self.head_dim)) for part in (query, key))
        if self.k > _FEW_CONTEXTS:
            own = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))
            return own.mul_(scale).permute(0, 2, 3, 1)
        own = workspace.take(f"{prefix} own logits", count, self.k, self.k, self.heads)
        product = workspace.take("own product", count, self.k, self.heads, self.head_dim)
        for number in range(self.k):
            torch.mul(query, key[:, number : number + 1], out=product)
            torch.sum(product, dim=-1, out=own[:, :, number])
        return own.mul_(scale)


class FusedLayers(Layers):
    """For a CPU: batched products of PyTorch, written into the workspace."""

    def width(self, length: int) -> int:
        """As `Layers.width`: with the own keys, the padded length is a multiple of `_WIDTH`."""
        return math.ceil((length + self.contexts) / _WIDTH) * _WIDTH - self.contexts

    def _keys_and_values(self, state: QueryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For every layer scaled keys and values (H, n, D), zero after the m tokens.

        n is `width` plus the number of own keys, whose columns follow the tokens.
        """
        keys, values = [], []
        length = int(state.lengths)
        padding = self.width(length) + self.contexts - length
        for key, value in zip(state.keys, state.values, strict=True):
            scaled = key[0].to(self.dtype) / math.sqrt(self.head_dim)
            keys.append(F.pad(scaled.transpose(0, 1), (0, 0, 0, padding)).contiguous())
            values.append(F.pad(value[0].to(self.dtype).transpose(0, 1), (0, 0, 0, padding)).contiguous())
        return tuple(keys), tuple(values)

    def _layer(self, workspace: Workspace, number: int, inputs: Inputs, state: Tensor | None, query: Query) -> Tensor:
        layer, count, d = self.layers[number], len(inputs.queries), self.d
        attended = self._attend(workspace, inputs, query.length, query.keys[number], query.values[number])
        rows = layer.attention_output.of(workspace, "rows", attended).view(count, self.rows, d)
        if self.contexts:
            rows[:, : self.k].add_(inputs.context)
        if self.has_state:
            self._gate(workspace, rows[:, -1], inputs.gate, state)
        normed = layer.attention_norm(rows.view(-1, d))
        return layer.output_norm(layer.feed_forward.added(workspace, normed)).view(count, self.rows, d)

    def _attend(self, workspace: Workspace, inputs: Inputs, m: int, key: Tensor, value: Tensor) -> Tensor:
        """Attention results (C * rows, d): of all rows to the query's m tokens, of contexts also to own keys.

        Logits have the rows last, as PyTorch's softmax over a few keys is several times as fast that way.
        """
        count, heads, k = len(inputs.queries), self.heads, self.contexts
        total, width = count * self.rows, value.shape[1]
        logits = workspace.take("logits", heads, width, total)
        queries = inputs.queries.view(total, heads, self.head_dim).transpose(0, 1)
        if self.dtype.itemsize < 4:
            # oneDNN would copy them itself, but transposed, which takes several times as long
            queries = workspace.take("queries by head", heads, total, self.head_dim).copy_(queries)
        torch.bmm(key, queries.mT, out=logits)
        if width > m:
            rest = logits.view(heads, width, count, self.rows)[:, m:].fill_(-math.inf)
            if k:
                rest[:, :k, :, :k] = inputs.own_logits.permute(3, 2, 0, 1)
        probs = torch.softmax(logits, dim=1, out=workspace.take("probs", heads, width, total))
        by_head = torch.bmm(probs.mT, value, out=workspace.take("by head", heads, total, self.head_dim))
        attended = workspace.take("attended", total, heads, self.head_dim).copy_(by_head.transpose(0, 1))
        if k:
            own = probs.view(heads, width, count, self.rows)[:, m : m + k, :, :k].permute(0, 2, 3, 1)
            contexts = attended.view(count, self.rows, heads, self.head_dim)[:, :k]
            self._add_own(workspace, contexts, own, inputs.value.unflatten(-1, (heads, self.head_dim)))
        return attended.view(total, self.d)

    def _add_own(self, workspace: Workspace, out: Tensor, probs: Tensor, value: Tensor) -> None:
        """Add own values (C, k, H, D), weighted by probs (H, C, k, k), to out (C, k, H, D)."""
        if self.k > _FEW_CONTEXTS:
            # (C, H, k, k) by (C, H, k, D)
            out.add_(torch.matmul(probs.transpose(0, 1), value.transpose(1, 2)).transpose(1, 2))
            return
        product = workspace.take("own product", *value.shape)
        # (C, k, k, H, 1)
        weights = probs.permute(1, 2, 3, 0).unsqueeze(-1)
        for number in range(self.k):
            # not fused (addcmul), which would round differently in different rows
            out.add_(torch.mul(weights[:, :, number], value[:, number : number + 1], out=product))

    def _gate(self, workspace: Workspace, update: Tensor, hint: Tensor, state: Tensor | None) -> None:
        """Gate the update u (C, d) in place: ``z*u + (1-z)*h``; state h, or None for zeros."""
        gate = self.gate_update.of(workspace, "gate", update, hint)
        if state is None:
            update.mul_(elementwise(torch.sigmoid_, gate))
            return
        gate = self.gate_state.of(workspace, "gate with state", state, gate)
        update.sub_(state).mul_(elementwise(torch.sigmoid_, gate)).add_(state)


class OperatorLayers(Layers):
    """For a GPU, and wherever the operators of `mixkernels` are faster; they run on the model's backend."""

    def interact(self, workspace: Workspace, inputs: Inputs, hint: Tensor, query: Query) -> Tensor:
        """As `Layers.interact`; for a single layer, LN2 and all that follows it is one operator."""
        if len(self.layers) > 1 or not (self.contexts and self.has_state):
            return super().interact(workspace, inputs, hint, query)
        # LN2, the mean over contexts, the product h * e and its sum
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
        """Return rows (C, rows, d) after LN1, and the FFN's output for them."""
        layer, count, k, d = self.layers[number], len(inputs.queries), self.contexts, self.d
        split = (self.heads, self.head_dim)
        attended = workspace.take("attended", count, self.rows, d)
        queries = inputs.queries.unflatten(-1, split)
        if k:
            own_logits = inputs.own_logits.float()
        else:
            # the operator needs contexts: pass the states as contexts that do not attend to themselves
            own_logits = torch.full((count, 1, 1, self.heads), -math.inf, dtype=torch.float32, device=self.device)
        by_head = attended.unflatten(-1, split)[None]
        candidate_attention(
            queries[:, : max(k, 1)],
            None,
            inputs.value.unflatten(-1, split) if k else queries,
            queries[:, -1] if k and self.has_state else None,
            query.keys[number],
            query.values[number],
            key_lengths=query.lengths,
            own_logits=own_logits,
            backend=self.model.kernel_backend,
            out=(by_head[:, :, : max(k, 1)], by_head[:, :, -1] if k and self.has_state else None),
        )
        rows = layer.attention_output.of(workspace, "rows", attended.view(-1, d)).view(attended.shape)
        norm, normed = layer.attention_norm, workspace.take("normed", count, self.rows, d)
        options = {"eps": norm.eps, "backend": self.model.kernel_backend}
        if k:
            residual_layer_norm(rows[:, :k], inputs.context, norm.weight, norm.bias, out=normed[:, :k], **options)
        if self.has_state:
            gate = self.gate_update.of(workspace, "gate", rows[:, -1], inputs.gate)
            if state is not None:
                gate = self.gate_state.of(workspace, "gate with state", state, gate)
            gate_layer_norm(gate, rows[:, -1], state, norm.weight, norm.bias, out=normed[:, -1], **options)
        return normed, layer.feed_forward.of(workspace, normed.view(-1, d)).view(normed.shape)


class _Layer:
    """An interaction layer's weights, prepared for the products."""

    def __init__(self, layer: InteractionLayer, dtype: torch.dtype, quantised: bool, packed: bool) -> None:
        def linear(module: nn.Linear) -> Linear:
            return Linear(module.weight.to(dtype).t(), module.bias.to(dtype))

        projections: Mapping[str, AnyLinear] = {
            name: _product(linear(getattr(layer, name)), False, packed)
            for name in ("query", "key", "value", "state_query")
            if hasattr(layer, name)
        }
        self.__dict__.update(projections)
        self.attention_output = _product(linear(layer.attention_output), quantised, packed)
        self.attention_norm, self.output_norm = (
            Norm(norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
            for norm in (layer.attention_norm, layer.output_norm)
        )
        first, second = linear(layer.intermediate), linear(layer.output)
        if quantised:
            self.feed_forward = QuantisedFeedForward(first, second, layer.activation)
        else:
            self.feed_forward = FloatFeedForward(
                _product(first, False, packed), _product(second, False, packed), layer.activation
            )


AnyLinear = Linear | PackedLinear | QuantisedLinear


def _product(linear: Linear, quantised: bool, packed: bool) -> AnyLinear:
    if quantised:
        return QuantisedLinear(linear)
    return PackedLinear(linear.weight.t(), linear.bias) if packed else linear


def prepare_layers(model: MixEncoderModel, products: str = "native") -> Layers:
    """Prepare a model's interaction layers for its device and dtype; products as in `Layers`.

    Raises:
        InputError: the device cannot compute these products.
    """
    on_operators = model.device.type != "cpu" or model.kernel_backend not in ("auto", "torch")
    return (OperatorLayers if on_operators else FusedLayers)(model, products)


def _dtype_of(model: MixEncoderModel, products: str) -> torch.dtype:
    """Return the dtype to compute products in: float32 where the device would emulate the wanted one.

    Raises:
        InputError: products is "bfloat16", which the device does not multiply natively.
    """
    if products == "auto" and model.dtype == torch.float32 and multiplies_faster(torch.bfloat16, model.device.type):
        return torch.bfloat16
    wanted = torch.bfloat16 if products == "bfloat16" else model.dtype
    native = multiplies_natively(wanted, model.device)
    if products == "bfloat16" and not native:
        raise InputError(
            'products "bfloat16" cannot run here: this processor does not multiply bfloat16 natively. Use products '
            '"native", which run everywhere, or "int8", which run on any CPU with oneDNN'
        )
    return wanted if native else torch.float32
