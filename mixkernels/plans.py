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

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types whose memory is what shape and strides say; others (fake, functional, ...) go by way of the dispatcher."""
_MOST = 4096
"""Plans of an operator; then the oldest are forgotten."""
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


def form_of(tensors: tuple[Any, ...], backend: Any, *flags: Any) -> tuple[Any, ...] | None:
    """Return the form of a call, a key of `Plans`; None if none is to be used (intercepted, autocast, unusual tensors).

    Args:
        tensors: tensors and None.
        backend: of the call.
        flags: other arguments that decisions depend on; hashable.
    """
    if intercepted() or _autocast() or not (backend is None or type(backend) is str):
        return None
    recorded = torch.is_grad_enabled()
    switch = _ENVIRONMENT.get
    form = [backend, flags, recorded, switch(_BACKEND), switch(_CHECKS), switch(_TUNING)]
    try:
        for tensor in tensors:
            if tensor is None:
                form.append(None)
            elif type(tensor) in _PLAIN and not tensor.is_neg():
                form.append(
                    (
                        tensor.shape,
                        tensor.stride(),
                        tensor.dtype,
                        tensor.device,
                        recorded and tensor.requires_grad,
                        tensor.data_ptr() % 16,
                    )
                )
            else:
                return None
    except RuntimeError:
        # a tensor without strides or memory: validation says what is wrong with it
        return None
    return tuple(form)


class Plans:
    """Plans of one operator by form; bounded, and safe to use from several threads."""

    def __init__(self, most: int = _MOST) -> None:
        """Keep at most `most` plans."""
        self._plans: dict[Any, Any] = {}
        self._most = most
        self._lock = Lock()
        self.get = self._plans.get
        _EVERY.append(self)

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

    def __len__(self) -> int:
        return len(self._plans)


_EVERY: list[Plans] = []


def clear() -> None:
    """Forget the plans of all operators, as after a change of a rule that plans follow."""
    for plans in _EVERY:
        plans.clear()
