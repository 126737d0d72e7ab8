"""Launch a kernel, and launch it again without Triton's launcher: that takes 31 of a call's microseconds.

Triton's launcher binds some 70 arguments, looks the compiled kernel up and asks for the device at every launch. The
next launch of the same form needs none of that: the same compiled kernel, the same numbers, other pointers.
"""

import importlib.metadata
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixkernels.triton_common.runtime import Workspace, device_of

_VERSIONS = ((3, 6), (3, 7))
"""Of Triton, whose compiled kernels are known to be called as `Launch` calls them; others take its own launcher."""


def _direct_launches() -> bool:
    try:
        installed = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, installed)) in _VERSIONS


_DIRECT = _direct_launches()


def _hooked(kernel: Any) -> bool:
    """Whether somebody wants to be told of launches, as Triton's profiler does: its own launcher tells them."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # None, a function, or a chain of functions
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or getattr(kernel, "pre_run_hooks", None)
    )


@cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _is_current(device: torch.device) -> bool:
    return torch._C._cuda_getDevice() == device.index


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


class Launch:
    """All of a launch but its pointers and the numbers that differ from call to call; holds no tensors.

    It may be used again where shapes, strides, dtypes and the pointers' alignment are the same (`mixkernels.plans`).
    """

    __slots__ = ("_compiled", "_rest", "device", "grid", "kernel", "numbers", "options", "workspace")

    def __init__(
        self,
        kernel: Any,
        grid: int,
        numbers: tuple[int, ...],
        options: dict[str, Any],
        device: torch.device,
        *,
        workspace: bool = False,
    ) -> None:
        """Describe a launch.

        Args:
            kernel: a ``triton.jit`` function whose arguments are pointers, the numbers of `__call__`, `numbers`, and
                constexpr ones.
            grid: number of programs.
            numbers: sizes and strides.
            options: constexpr arguments, num_warps and num_stages.
            device: of the tensors.
            workspace: the kernel makes descriptors.
        """
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self.device, self.workspace = device, workspace
        self._compiled: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, tensors: Sequence[Tensor | None], stand_in: Tensor, *varying: float) -> None:
        """Launch on the current stream of the device.

        Args:
            tensors: one for each pointer of the kernel; None: absent and never read.
            stand_in: whose pointer takes the place of absent ones.
            varying: numbers that follow the pointers and may differ between calls.
        """
        compiled = self._compiled
        if compiled is not None and not _hooked(self.kernel) and _is_current(self.device):
            spare = stand_in.data_ptr()
            pointers = [spare if tensor is None else tensor.data_ptr() for tensor in tensors]
            arguments = (*pointers, *varying, *self._rest)
            # a grid of three dimensions; neither metadata nor hooks
            launch = (
                self.grid,
                1,
                1,
                _stream(self.device),
                compiled.function,
                compiled.packed_metadata,
                None,
                None,
                None,
            )
            if self.workspace:
                with Workspace(True):
                    compiled.run(*launch, *arguments)
            else:
                compiled.run(*launch, *arguments)
            return
        given = [stand_in if tensor is None else tensor for tensor in tensors]
        with device_of(stand_in), Workspace(self.workspace):
            compiled = self.kernel[(self.grid,)](*given, *varying, *self.numbers, **self.options)
        if compiled is not None and _DIRECT:
            names = self.kernel.arg_names
            first = len(tensors) + len(varying)
            constants = (self.options[name] for name in names[first + len(self.numbers) :])
            self._rest = (*self.numbers, *constants)
            self._compiled = compiled
