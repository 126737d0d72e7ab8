"""Group texts into passes of the backbone such that a text's encoding has the same bits whatever texts are beside it.

Three rules make a text's encoding independent of the other texts (docs/determinism.md):

- A text is padded to a length that depends only on its own length, and the padding is masked exactly: masked keys have
  the weight 0.
- On a CPU a pass runs on one thread, and as many passes run in parallel as PyTorch has threads. Products are then never
  cut between threads, and within a pass no thread waits for another, which keeps encoding fast beside other busy
  processes. A single pass uses all threads if that gives the same bits.
- The number of texts in a pass may change the routine that a library multiplies with. Which numbers of texts give the
  same bits is tested once for each length (`ShapeTrial`).

Called by `mixencoder.base.encoding`.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixencoder.base.backbones import layout_of, max_positions
from mixencoder.base.linears import arranged_linear
from mixencoder.base.modeling import HeadedModel
from mixencoder.base.prepared_encoder import PreparedEncoder
from mixencoder.base.threads import on_one_thread, run_in_order

STEP = 8
"""Texts are padded to a multiple of this many tokens."""
PASS_TOKENS = 256
"""Tokens of a full pass on a CPU: enough for fast products on one thread, few enough to give every thread a pass."""
_GPU_PASS_TOKENS = 2**15
_EFFICIENT_TOKENS = 96
"""A pass of at least this many tokens runs at nearly full speed."""


class Pass(NamedTuple):
    """Texts that go through the backbone together."""

    numbers: list[int]
    """Numbers of the texts, one for each row; further rows are copies of the last, to fill the shape."""
    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) int64, 1 for tokens."""
    threads: int
    """Number of threads that each operator uses."""


class PassShape(NamedTuple):
    """Number of texts and threads of a pass, at a given length."""

    texts: int
    threads: int


class EncoderPasses:
    """Runs texts through a model's encoder.

    Args:
        model: with the encoder as its backbone.
        pad_id: token id of padding. It is masked; it matters only to encoders that compute positions from it.
    """

    def __init__(self, model: HeadedModel, pad_id: int) -> None:
        self._pad_id, self._longest = pad_id, max_positions(model.backbone.config)
        self._prepared = model.prepared_encoder
        self._trial = ShapeTrial(model.backbone, self._prepared)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        encode: Callable[[Tensor, Tensor], Any],
        *,
        batch_size: int,
        device: torch.device,
        alone: bool,
    ) -> Iterator[tuple[list[int], Any]]:
        """Encode token rows; for each pass yield the numbers of its texts and the result of encode.

        Args:
            rows: token ids, special tokens included.
            encode: from ids and mask, (B, L) each, to results with B rows in the same order. B may exceed the number of
                texts in the pass, and L a text's number of tokens.
            batch_size: most texts in a pass.
            device: of the model.
            alone: True gives the bits of a pass with one text and all threads: for queries, as most calls have one.
                False gives the bits of full passes: for documents, as there are many.
        """
        # in this thread, as the threads of passes only use what a call's own thread has prepared
        self._prepared()
        groups = defaultdict(list)
        for number, row in enumerate(rows):
            groups[min(-(-len(row) // STEP) * STEP, self._longest)].append(number)
        on_cpu = device.type == "cpu"
        # longest first, so that a lack of memory shows at once
        passes = [
            self._padded_pass([rows[number] for number in numbers], numbers, length, shape, device)
            for length in sorted(groups, reverse=True)
            for numbers, shape in self._cut(groups[length], length, batch_size, alone=alone, on_cpu=on_cpu)
        ]
        if len(passes) == 1 and passes[0].threads == 1 and on_cpu:
            passes = [self._with_all_threads(passes[0], alone=alone)]
        yield from _run_all(passes, encode, torch.get_num_threads() if on_cpu else 1)

    def _cut(
        self, numbers: list[int], length: int, batch_size: int, *, alone: bool, on_cpu: bool
    ) -> Iterator[tuple[list[int], PassShape]]:
        """Cut the texts of one padded length into passes; the last one may have fewer texts than its shape."""
        if not on_cpu:
            size = max(1, min(batch_size, _GPU_PASS_TOKENS // length))
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                yield part, PassShape(len(part), 1)
            return
        if alone and len(numbers) == 1:
            # nothing to test: this shape defines the bits that other shapes must give
            yield numbers, PassShape(1, torch.get_num_threads())
            return
        shapes = self._trial.shapes(length, alone=alone)
        allowed = [shape for shape in shapes if shape.texts <= batch_size] or shapes[-1:]
        start = 0
        while start < len(numbers):
            left = len(numbers) - start
            shape = next((shape for shape in allowed if shape.texts <= left), allowed[-1])
            yield numbers[start : start + shape.texts], shape
            start += shape.texts

    def _with_all_threads(self, single: Pass, *, alone: bool) -> Pass:
        """Return the pass with all threads if that gives the same bits, else as it is."""
        texts, length = single.input_ids.shape
        threads = torch.get_num_threads()
        same = self._trial.agrees(length, PassShape(texts, threads), alone=alone)
        return single._replace(threads=threads) if same else single

    def _padded_pass(
        self, rows: list[Sequence[int]], numbers: list[int], length: int, shape: PassShape, device: torch.device
    ) -> Pass:
        rows = rows + rows[-1:] * (shape.texts - len(rows))
        ids = [[*row, *[self._pad_id] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return Pass(numbers, torch.tensor(ids, device=device), torch.tensor(mask, device=device), shape.threads)


_Kind = tuple[torch.dtype, bool]
"""Dtype of the weights, and whether the encoder is prepared (`mixencoder.base.prepared_encoder`)."""


class ShapeTrial:
    """Finds by experiment which shapes of passes give a text the same bits.

    The operators of a backbone layer run on passes in which every text is the same. Two shapes agree if the results
    have the same bits. Inputs and weights are random: only the shapes of products decide which routine computes them.
    The terms of every product cancel, so that what is left are rounding errors: another order of summation then changes
    nearly every number. With ordinary weights, half precision would round nearly every difference away.
    Results are kept by length and number of threads.

    Args:
        backbone: its first layer gives the shapes of the products.
        prepared: returns what runs in place of the backbone, or None if the backbone itself does.
    """

    def __init__(self, backbone: Any, prepared: Callable[[], PreparedEncoder | None] = lambda: None) -> None:
        self._prepared = prepared
        self._layer = layout_of(backbone.config).layers(backbone)[0]
        self._heads = backbone.config.num_attention_heads
        self._width = backbone.config.hidden_size
        self._lock = threading.Lock()
        self._outputs: dict[tuple[int, PassShape, _Kind], tuple[Tensor, ...] | None] = {}
        self._shapes: dict[tuple[int, int, bool, _Kind], list[PassShape]] = {}

    def shapes(self, length: int, *, alone: bool) -> list[PassShape]:
        """Return the shapes of passes of a length whose bits agree, most texts first; at least one."""
        threads = torch.get_num_threads()
        key = length, threads, alone, self._kind
        with self._lock:
            if key not in self._shapes:
                sizes = [1]
                while 2 * sizes[-1] * length <= PASS_TOKENS:
                    sizes.append(2 * sizes[-1])
                candidates = [PassShape(size, 1) for size in reversed(sizes)]
                single = PassShape(1, threads)
                if alone:
                    agreeing = [shape for shape in candidates if self._agree(length, shape, single)]
                    self._shapes[key] = agreeing if single in agreeing else [*agreeing, single]
                else:
                    self._shapes[key] = self._best_class(length, candidates)
            return self._shapes[key]

    def agrees(self, length: int, shape: PassShape, *, alone: bool) -> bool:
        """Whether a pass of a shape gives the same bits as the shapes that `shapes` returns."""
        known = self.shapes(length, alone=alone)
        with self._lock:
            return shape in known or self._agree(length, shape, known[-1])

    def _best_class(self, length: int, candidates: list[PassShape]) -> list[PassShape]:
        """Return the best class of shapes that agree with one another.

        A class needs a shape that is large enough to be efficient; among those the one with the smallest shape wastes
        least when few texts are left.
        """
        classes: list[list[PassShape]] = []
        for shape in candidates:
            found = next((c for c in classes if self._agree(length, c[0], shape)), None)
            if found is not None:
                found.append(shape)
            elif self._output(length, shape) is not None:
                classes.append([shape])
        if not classes:
            # in every shape bits depend on the row: passes of one text at least have no neighbours
            return [candidates[-1]]
        efficient = [c for c in classes if c[0].texts * length >= _EFFICIENT_TOKENS] or classes
        return min(efficient, key=lambda shapes: shapes[-1].texts)

    def _agree(self, length: int, one: PassShape, other: PassShape) -> bool:
        if one == other:
            return True
        found, wanted = self._output(length, one), self._output(length, other)
        if found is None or wanted is None:
            return False
        return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def _output(self, length: int, shape: PassShape) -> tuple[Tensor, ...] | None:
        """Return the operators' results for a text in a pass of this shape; None if they differ between rows."""
        key = length, shape, self._kind
        if key not in self._outputs:
            run = partial(self._run, length, shape.texts)
            self._outputs[key] = run() if shape.threads > 1 else on_one_thread(run)
        return self._outputs[key]

    @torch.inference_mode()
    def _run(self, length: int, texts: int) -> tuple[Tensor, ...] | None:
        """Run every operator on copies of random texts, `texts` in a pass; return one copy's results.

        None if the copies' results differ.
        """
        generator = torch.Generator().manual_seed(length)
        # half precision rounds most differences away, so more distinct texts are needed to see one
        distinct = 1 if self._dtype.itemsize >= 4 else max(1, PASS_TOKENS // length)
        copies = -(-texts // distinct)

        def rows(width: int) -> Tensor:
            random = torch.randn(distinct, length, width, generator=generator, dtype=torch.float32, device="cpu")
            return random.to(self._dtype).repeat(copies, 1, 1)

        def in_passes(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            return torch.cat([function(*parts) for parts in zip(*(each.split(texts) for each in inputs), strict=True)])

        results = []
        prepared = self._kind[1]
        for wide, narrow, has_bias in sorted(self._linears()):
            weight = torch.randn(narrow, wide, generator=generator, dtype=torch.float32, device="cpu").to(self._dtype)
            bias = torch.zeros(narrow, dtype=self._dtype, device="cpu") if has_bias else None
            inputs, weight = _mirrored(rows(wide), -1), _mirrored(weight, 1)
            if prepared:
                linear = _on_texts(arranged_linear(weight, bias))
                # a sum that the product includes may change its routine
                nothing = inputs.new_zeros(*inputs.shape[:-1], narrow)
                results.append(in_passes(linear, inputs, nothing))
            else:
                linear = partial(F.linear, weight=weight, bias=bias)
            results.append(in_passes(linear, inputs))
            results.append(in_passes(F.gelu, rows(narrow)))
        valid = (torch.arange(length, device="cpu") < length - 1).expand(distinct * copies, 1, length, length)
        split = (self._heads, self._width // self._heads)
        if prepared:
            query, key, value = rows(3 * self._width).unflatten(-1, (3, *split)).permute(2, 0, 3, 1, 4)
            mask = torch.zeros(valid.shape, dtype=self._dtype, device="cpu").masked_fill_(~valid, -math.inf)
        else:
            query, key, value = (rows(self._width).unflatten(-1, split).transpose(1, 2) for _ in range(3))
            mask = valid
        results.append(in_passes(F.scaled_dot_product_attention, query, key, value, mask))
        outputs = [out.unflatten(0, (copies, distinct)) for out in results]
        if not all(torch.equal(out, out[:1].expand_as(out)) for out in outputs):
            return None
        return tuple(out[0].clone() for out in outputs)

    def _linears(self) -> set[tuple[int, int, bool]]:
        """Return the shapes of the layer's linear layers: number of inputs, of outputs, and whether there is a bias."""
        linears = (module for module in self._layer.modules() if isinstance(module, nn.Linear))
        shapes = {(linear.in_features, linear.out_features, linear.bias is not None) for linear in linears}
        # a prepared layer multiplies by W_q, W_k and W_v together
        return {*shapes, (self._width, 3 * self._width, True)} if self._kind[1] else shapes

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._layer.parameters()).dtype

    @property
    def _kind(self) -> _Kind:
        return self._dtype, self._prepared() is not None


def _on_texts(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of rows (R, in) as one of texts (B, n, in)."""

    def run(texts: Tensor, *added: Tensor) -> Tensor:
        return linear(texts.flatten(0, 1), *(part.flatten(0, 1) for part in added)).unflatten(0, texts.shape[:2])

    return run


def _mirrored(rows: Tensor, sign: int) -> Tensor:
    """Copy the first half of every row to the second, times `sign`, and mix the columns, in the same way for a width.

    Products of rows with sign 1 and rows with sign -1 are zero but for rounding.
    """
    width = rows.shape[-1]
    half = rows[..., : width // 2]
    odd = rows.new_zeros(*rows.shape[:-1], width % 2)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width), device="cpu")
    return torch.cat([half, sign * half, odd], dim=-1)[..., order].contiguous()


def _run_all(
    passes: list[Pass], encode: Callable[[Tensor, Tensor], Any], threads: int
) -> Iterator[tuple[list[int], Any]]:
    """Run passes, those of one thread in parallel; yield texts' numbers and results in order."""

    def run(item: Pass) -> Any:
        # the mode belongs to a thread, and this may be one of the pool
        with torch.inference_mode():
            return encode(item.input_ids, item.attention_mask)

    in_parallel = [item for item in passes if threads > 1 and item.threads == 1]
    results = run_in_order(run, in_parallel, threads)
    for item in passes:
        yield item.numbers, next(results) if threads > 1 and item.threads == 1 else run(item)
