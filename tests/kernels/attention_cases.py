"""Random calls of `candidate_attention` in every form, as the contract tests run them."""

import mmap
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from mixkernels import CandidateAttention, candidate_attention
from tests.conftest import count_kernel_run
from tests.kernels.attention_oracle import attention_by_loops

BACKENDS = ["reference", "torch", "triton"]
FORMS = ["pool", "per query", "gathered", "ragged", "ragged gather"]
LOW = [torch.float16, torch.bfloat16]
INPUTS = ("context_query", "context_key", "context_value", "state_query", "key", "value", "own_logits")


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def far_apart(tensor: Tensor, distance: int, dim: int = 0) -> Tensor:
    """Copy a tensor with this stride, in elements, in one dimension.

    It lies in the middle of untouched memory, so an offset that wrapped around reads zeros; untouched pages cost none.
    """
    strides = list(tensor.contiguous().stride())
    strides[dim] = distance
    reach = distance * (tensor.shape[dim] - 1) + tensor.numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    room = torch.frombuffer(mmap.mmap(-1, 2 * reach * tensor.element_size(), flags=flags), dtype=tensor.dtype)
    return room.as_strided(tensor.shape, strides, reach).copy_(tensor)


@dataclass
class Case:
    """Inputs of one call: tensors by name, and what is plain."""

    tensors: dict[str, Tensor]
    lengths: list[int] | None = None
    ids: list | None = None
    offsets: list[int] | None = None
    scales: tuple[Tensor, Tensor | None, Tensor] | None = None
    options: dict = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        n=5,
        k=1,
        m=7,
        b=1,
        h=2,
        d=16,
        *,
        form="pool",
        state=True,
        lengths=None,
        dtype=torch.float32,
        seed=0,
        own_logits=False,
        int8=False,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        lead = (b, n) if form == "per query" else (n,)
        ids = offsets = scales = None
        if "ragged" in form:
            total = n if form == "ragged" else n + 3
            # one query has no candidates when there are several
            cuts = sorted(torch.randint(0, total + 1, (b - 1,), generator=generator).tolist())
            offsets = [0, *cuts, total]
            if b > 2:
                offsets[2] = offsets[1]
        if "gather" in form and n == 0:
            offsets, ids = ([0] * (b + 1), []) if offsets else (None, [[]] * b)
        elif form == "gathered":
            ids = torch.randint(0, n, (b, n + 2), generator=generator).tolist()
        elif form == "ragged gather":
            ids = torch.randint(0, n, (offsets[-1],), generator=generator).tolist()
        contexts = [randn(*lead, k, h, d) for _ in range(3)]
        if int8:
            contexts = [torch.randint(-127, 128, t.shape, generator=generator, dtype=torch.int8) for t in contexts]
            scales = [(torch.rand(*lead, k, h, generator=generator) + 0.2) / 70 for _ in range(3)]
        tensors = dict(zip(INPUTS, contexts, strict=False))
        tensors |= {"state_query": randn(*lead, h, d)} if state else {}
        tensors |= {"key": randn(b, m, h, d), "value": randn(b, m, h, d)}
        if own_logits:
            del tensors["context_key"]
            tensors["own_logits"] = torch.randn(*lead, k, k, h, generator=generator)
            scales = None if scales is None else [scales[0], None, scales[2]]
        return cls(tensors, lengths, ids, offsets, None if scales is None else tuple(scales))

    def __getitem__(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    @property
    def dtype(self) -> torch.dtype:
        return self["key"].dtype

    def pick(self, index: Tensor) -> "Case":
        """Return the case with some of a pool's candidates."""
        picked = {name: t if name in ("key", "value") else t[index] for name, t in self.tensors.items()}
        return replace(self, tensors=picked)

    def changed(self, **tensors: Tensor) -> "Case":
        return replace(self, tensors={**self.tensors, **tensors})

    def call(self, backend: str, config: pytest.Config | None = None, **options) -> CandidateAttention:
        """Run on the backend's device; results stay there, differentiable."""
        if backend == "triton" and config is not None:
            count_kernel_run(config)
        device = device_of(backend)

        def index(values: list | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)

        tensors = {name: None if self[name] is None else self[name].to(device) for name in INPUTS}
        own_logits = tensors.pop("own_logits")
        scales = self.scales and tuple(None if scale is None else scale.to(device) for scale in self.scales)
        ids = index(self.ids)
        if ids is not None and self.offsets is None:
            ids = ids.view(len(self.ids), -1)
        return candidate_attention(
            **tensors,
            own_logits=own_logits,
            context_scales=scales,
            key_lengths=index(self.lengths),
            candidate_ids=ids,
            candidate_offsets=index(self.offsets),
            backend=backend,
            **{"return_lse": True, **self.options, **options},
        )

    def run(self, backend: str, config: pytest.Config | None = None, **options) -> CandidateAttention:
        """Run without gradients; results on the CPU."""
        with torch.no_grad():
            result = self.call(backend, config, **options)
        return CandidateAttention(*(None if t is None else t.cpu() for t in result))

    def gradients(self, backend: str, config: pytest.Config | None = None, *, lse: bool = True) -> dict[str, Tensor]:
        """Gradients of a weighted sum of all outputs, by input, on the CPU."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.tensors.items()}
        result = replace(self, tensors=leaves).call(backend, config, return_lse=lse)
        total = 0.0
        for number, output in enumerate(result):
            if output is not None and output.numel():
                # the same weights whatever the output's layout and device
                weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(number)).to(output.device)
                total = total + (output.masked_fill(output.isinf(), 0.0).to(weight.dtype) * weight).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return {name: gradient.cpu() for name, gradient in zip(leaves, gradients, strict=True)}

    def double(self) -> "Case":
        return replace(
            self, tensors={name: t if t.dtype == torch.int8 else t.double() for name, t in self.tensors.items()}
        )

    def oracle(self):
        positional = [self[name] for name in INPUTS[:6]]
        return attention_by_loops(
            *positional,
            self.lengths,
            self.options.get("scale"),
            ids=self.ids,
            offsets=self.offsets,
            own_logits=self["own_logits"],
            scales=self.scales,
        )
