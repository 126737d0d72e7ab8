"""Remember what an operator decided about a call, so that the next call of the same form decides nothing again.

A form is everything about the arguments that decisions depend on: of each tensor its shape, strides, dtype, device, 16
byte alignment and whether it requires a gradient; the flags of the call; and the environment's switches. Plans hold
verdicts, sizes and compiled kernels, never tensors. What depends on values (ranges of ids) is not part of a plan.
"""

import os
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
"""Types whose memory is what shape and strides say; others (fake, functional, ...) go by way of the dispatcher."""
_MOST = 4096
"""Plans of an operator; then the oldest are forgotten."""
_RECENT = 4
"""Plans of an operator that are found without hashing."""
_ALIGNED = 15
"""Bits that are zero in a pointer to 16 bytes."""
_SWITCHES = ("MIXKERNELS_BACKEND", "MIXKERNELS_CHECKS", "MIXKERNELS_TUNING")
# a look-up of os.environ takes a microsecond if a name is missing
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_BACKEND, _CHECKS, _TUNING = (
    os.environ.encodekey(name) if hasattr(os.environ, "encodekey") and _ENVIRONMENT is not os.environ else name
    for name in _SWITCHES
)
# missing in versions of PyTorch without them, where every call then goes by way of the dispatcher
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_jit_trace = torch._C._get_tracing_state
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_profiler = torch.autograd._profiler_enabled


def intercepted() -> bool:
    """Whether PyTorch must see a call as an operator: something compiles, traces, transforms, counts or profiles it."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms()
        or _profiler()
        or _jit_trace() is not None
    )


class Plans:
    """Plans of one operator by form; bounded, and safe to use from several threads.

    The most recent forms are compared by the C++ check of torch.compile's guards (sizes, strides, dtype, device,
    gradient and dispatch keys of all tensors, and the dispatcher's state), which takes a microsecond. Others are found
    by hashing.
    """

    def __init__(self, most: int = _MOST) -> None:
        """Keep at most `most` plans."""
        self._plans: dict[Any, Any] = {}
        self._recent: tuple[tuple[Any, ...], ...] = ()
        self._hashed: Any = None
        self._most = most
        self._lock = Lock()
        _EVERY.append(self)

    def find(self, tensors: tuple[Any, ...], backend: Any, *flags: Any) -> tuple[Any, tuple[Any, ...] | None]:
        """Return the plan of a call and its form; both None if none is to be used (intercepted, unusual tensors).

        Args:
            tensors: tensors and None.
            backend: of the call.
            flags: other arguments that decisions depend on; hashable.
        """
        if intercepted() or not (backend is None or type(backend) is str):
            return None, None
        switch = _ENVIRONMENT.get
        flags = (backend, flags, torch.is_grad_enabled(), switch(_BACKEND), switch(_CHECKS), switch(_TUNING))
        # which of them are None, too
        types = tuple(map(type, tensors))
        given = [tensor for tensor in tensors if tensor is not None]
        try:
            for known, known_types, check, plan in self._recent:
                if known == flags and known_types == types and check(*given):
                    pointers = 0
                    for tensor in given:
                        pointers |= tensor.data_ptr()
                    if not pointers & _ALIGNED:
                        return plan, None
            if not _PLAIN.issuperset(types) or _autocast() or any(tensor.is_neg() for tensor in given):
                # memory of views such as torch.imag(z.conj()) holds negated numbers
                return None, None
            form = (flags, *(None if tensor is None else _part(tensor, flags[2]) for tensor in tensors))
        except RuntimeError:
            # a tensor without strides or memory: validation says what is wrong with it
            return None, None
        plan = self._plans.get(form)
        if plan is not None:
            # forms that take turns do not push each other out
            if len(self._recent) < _RECENT or plan is self._hashed:
                self._promote(form, types, given, plan)
            self._hashed = plan
        return plan, form

    def _promote(self, form: tuple[Any, ...], types: tuple[type, ...], given: list[Tensor], plan: Any) -> None:
        """Let a plan be found by the check of guards, in place of the one that was least recently promoted."""
        # the check takes no tensor twice
        if _Guards is None or len(set(map(id, given))) < len(given) or any(part[4] for part in form[1:] if part):
            return
        try:
            guards = _Guards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except TypeError:
            # another version of PyTorch
            return
        entry = (form[0], types, guards.check, plan)
        with self._lock:
            self._recent = (entry, *self._recent[: _RECENT - 1])

    def remember(self, form: tuple[Any, ...], plan: Any) -> None:
        """Keep a plan; it must not hold tensors."""
        with self._lock:
            while len(self._plans) >= self._most:
                del self._plans[next(iter(self._plans))]
            self._plans[form] = plan

    def clear(self) -> None:
        """Forget all plans."""
        with self._lock:
            self._plans.clear()
            self._recent, self._hashed = (), None

    def __len__(self) -> int:
        return len(self._plans)


def _part(tensor: Tensor, recorded: bool) -> tuple[Any, ...]:
    """Of a form: what decisions depend on in one tensor."""
    aligned = tensor.data_ptr() & _ALIGNED
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, aligned, recorded and tensor.requires_grad


_EVERY: list[Plans] = []


def clear() -> None:
    """Forget the plans of all operators, as after a change of a rule that plans follow."""
    for plans in _EVERY:
        plans.clear()
