"""Encoder passes: how texts are gathered into passes of the backbone so that a text's bits are its own.

Three rules make what is computed of a text independent of the texts beside it (docs/determinism.md):

- A text is padded to a length that depends on its own length alone, and the padding is masked, exactly: masked keys
  have the weight 0.
- On a CPU a pass runs on one thread, and passes run side by side on as many threads as PyTorch has. A product is then
  never cut between threads, and no thread waits for another within a pass, which also is what makes encoding beside
  other busy processes bearable. A pass that is alone takes all threads where that gives the same bits.
- How many texts stand in a pass may change the routine that a library multiplies with. Which numbers of texts give the
  same bits is found by trying, once a length (`ShapeTrial`).

`mixencoder.base.engine` calls this.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixencoder.base.backbones import layout_of, max_positions
from mixencoder.base.threads import on_one_thread, run_in_order

STEP = 8
"""Texts are padded to a multiple of so many tokens."""
PASS_TOKENS = 256
"""Tokens of a full pass on a CPU: enough for one thread's products to run at full speed, few enough to share out."""
_GPU_PASS_TOKENS = 2**15
_EFFICIENT_TOKENS = 96
"""From so many tokens on, a pass runs at nearly full speed."""


class Pass(NamedTuple):
    """Texts that go through the backbone together."""

    numbers: list[int]
    """Which texts; the pass may hold further rows, repeats of the last."""
    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) int64, 1 for tokens."""
    threads: int


class PassShape(NamedTuple):
    """A shape of passes of one length."""

    texts: int
    threads: int


class EncoderPasses:
    """Runs texts through a model's encoder.

    Args:
        backbone: the encoder.
        pad_id: token id that stands for padding; masked, so that any id will do but where positions are counted by it.
    """

    def __init__(self, backbone: Any, pad_id: int) -> None:
        self._pad_id, self._longest = pad_id, max_positions(backbone.config)
        self._trial = ShapeTrial(backbone)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        encode: Callable[[Tensor, Tensor], Any],
        *,
        batch_size: int,
        device: torch.device,
        alone: bool,
    ) -> Iterator[tuple[list[int], Any]]:
        """Encode token rows; yields the numbers of a pass's texts and what encode made of the pass.

        Args:
            rows: token ids, special tokens included.
            encode: from ids and mask, (B, L) each, to results with B rows in the same order, which may be more rows
                than the pass has texts, and more tokens than a text has.
            batch_size: most texts of a pass.
            device: where the model lies.
            alone: bits are those of a text in a pass of its own with all threads: for queries, of which most calls
                have one. Otherwise they are those that a full pass gives: for documents, of which there are many.
        """
        groups = defaultdict(list)
        for number, row in enumerate(rows):
            groups[min(-(-len(row) // STEP) * STEP, self._longest)].append(number)
        on_cpu = device.type == "cpu"
        # longest first: what does not fit into memory fails at once
        passes = [
            self._pass([rows[number] for number in numbers], numbers, length, shape, device)
            for length in sorted(groups, reverse=True)
            for numbers, shape in self._shared_out(groups[length], length, batch_size, alone=alone, on_cpu=on_cpu)
        ]
        if len(passes) == 1 and passes[0].threads == 1 and on_cpu:
            passes = [self._with_all_threads(passes[0], alone=alone)]
        yield from _run_all(passes, encode, torch.get_num_threads() if on_cpu else 1)

    def _shared_out(
        self, numbers: list[int], length: int, batch_size: int, *, alone: bool, on_cpu: bool
    ) -> Iterator[tuple[list[int], PassShape]]:
        """Cut the texts of one length into passes; a pass with fewer texts than its shape is filled up."""
        if not on_cpu:
            size = max(1, min(batch_size, _GPU_PASS_TOKENS // length))
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                yield part, PassShape(len(part), 1)
            return
        if alone and len(numbers) == 1:
            # nothing to try: these are the bits that the others are to have
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

    def _with_all_threads(self, one: Pass, *, alone: bool) -> Pass:
        texts, length = one.input_ids.shape
        threads = torch.get_num_threads()
        same = self._trial.agrees(length, PassShape(texts, threads), alone=alone)
        return one._replace(threads=threads) if same else one

    def _pass(
        self, rows: list[Sequence[int]], numbers: list[int], length: int, shape: PassShape, device: torch.device
    ) -> Pass:
        rows = rows + rows[-1:] * (shape.texts - len(rows))
        ids = [[*row, *[self._pad_id] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return Pass(numbers, torch.tensor(ids, device=device), torch.tensor(mask, device=device), shape.threads)


class ShapeTrial:
    """Finds by trying which shapes of passes give a text the same bits, with the operators of the backbone's layer.

    The same rows are put into every place of a pass; shapes agree if they come out with the same bits. Only the shapes
    of the products matter, not the numbers in them. Results are kept by length and number of threads.

    Args:
        backbone: whose first layer says which products there are.
    """

    def __init__(self, backbone: Any) -> None:
        self._layer = layout_of(backbone.config).layers(backbone)[0]
        self._heads = backbone.config.num_attention_heads
        self._width = backbone.config.hidden_size
        self._lock = threading.Lock()
        self._outputs: dict[tuple[int, PassShape, torch.dtype], tuple[Tensor, ...] | None] = {}
        self._shapes: dict[tuple[int, int, bool, torch.dtype], list[PassShape]] = {}

    def shapes(self, length: int, *, alone: bool) -> list[PassShape]:
        """Return the shapes of passes of a length whose bits agree, most texts first; there is always one."""
        threads = torch.get_num_threads()
        key = length, threads, alone, self._dtype
        with self._lock:
            if key not in self._shapes:
                sizes = [1]
                while 2 * sizes[-1] * length <= PASS_TOKENS:
                    sizes.append(2 * sizes[-1])
                tried = [PassShape(size, 1) for size in reversed(sizes)]
                single = PassShape(1, threads)
                if alone:
                    agreeing = [shape for shape in tried if self._agree(length, shape, single)]
                    self._shapes[key] = agreeing if single in agreeing else [*agreeing, single]
                else:
                    self._shapes[key] = self._best_class(length, tried)
            return self._shapes[key]

    def agrees(self, length: int, shape: PassShape, *, alone: bool) -> bool:
        """Whether a pass of a shape has the bits of those that `shapes` returns."""
        known = self.shapes(length, alone=alone)
        with self._lock:
            return shape in known or self._agree(length, shape, known[-1])

    def _best_class(self, length: int, tried: list[PassShape]) -> list[PassShape]:
        """The shapes that agree with one another, of those classes that hold an efficient one the least wasteful."""
        classes: list[list[PassShape]] = []
        for shape in tried:
            found = next((c for c in classes if self._agree(length, c[0], shape)), None)
            if found is not None:
                found.append(shape)
            elif self._output(length, shape) is not None:
                classes.append([shape])
        if not classes:
            # no shape gives its copies equal bits: one text a pass has no neighbours at least
            return [tried[-1]]
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
        """What one text's rows become in a pass of this shape; None if its copies differ."""
        key = length, shape, self._dtype
        if key not in self._outputs:
            run = partial(self._run, length, shape.texts)
            self._outputs[key] = run() if shape.threads > 1 else on_one_thread(run)
        return self._outputs[key]

    @torch.inference_mode()
    def _run(self, length: int, texts: int) -> tuple[Tensor, ...] | None:
        """Every operator's output for the texts that are tried, in passes of so many; None if copies differ."""
        generator = torch.Generator().manual_seed(length)
        # a narrow dtype rounds most differences away: only many numbers show one
        tried = 1 if self._dtype.itemsize >= 4 else max(1, PASS_TOKENS // length)
        copies = -(-texts // tried)

        def rows(width: int) -> Tensor:
            distinct = torch.randn(tried, length, width, generator=generator, dtype=torch.float32, device="cpu")
            return distinct.to(self._dtype).repeat(copies, 1, 1)

        def in_passes(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            return torch.cat([function(*parts) for parts in zip(*(each.split(texts) for each in inputs), strict=True)])

        results = []
        for shape, layer in sorted(self._linears().items()):
            results.append(
                in_passes(lambda part, layer=layer: F.linear(part, layer.weight, layer.bias), rows(shape[0]))
            )
            results.append(in_passes(F.gelu, results[-1]))
        split = (self._heads, self._width // self._heads)
        query, key, value = (rows(self._width).unflatten(-1, split).transpose(1, 2) for _ in range(3))
        mask = (torch.arange(length, device="cpu") < length - 1).expand(tried * copies, 1, length, length)
        results.append(in_passes(F.scaled_dot_product_attention, query, key, value, mask))
        outputs = [out.unflatten(0, (copies, tried)) for out in results]
        if not all(torch.equal(out, out[:1].expand_as(out)) for out in outputs):
            return None
        return tuple(out[0].clone() for out in outputs)

    def _linears(self) -> dict[tuple[int, int, bool], nn.Linear]:
        """The layer's products, one of each shape."""
        found = {}
        for module in self._layer.modules():
            if isinstance(module, nn.Linear):
                found[module.in_features, module.out_features, module.bias is not None] = module
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._layer.parameters()).dtype


def _run_all(
    passes: list[Pass], encode: Callable[[Tensor, Tensor], Any], threads: int
) -> Iterator[tuple[list[int], Any]]:
    """Run passes, those of one thread side by side, and yield what they give in order."""

    def run(one: Pass) -> Any:
        with torch.inference_mode():
            return encode(one.input_ids, one.attention_mask)

    apart = [one for one in passes if threads > 1 and one.threads == 1]
    results = run_in_order(run, apart, threads)
    for one in passes:
        yield one.numbers, next(results) if threads > 1 and one.threads == 1 else run(one)
