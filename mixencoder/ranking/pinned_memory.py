"""Pinned memory: copy rows to the GPU while it scores the rows before them.

`mixencoder.ranking.candidate_buffer` is the caller. Also runs on a CPU, where every copy is finished at once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Arrays = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Name of an array -> shape of a row, and dtype."""


class Staging:
    """Two pinned buffers through which rows are copied to a device: one is filled while the other is copied.

    Args:
        arrays: the arrays to copy.
        rows: the most rows of a copy.
        device: the device to copy to.
    """

    def __init__(self, arrays: Arrays, rows: int, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._buffers = [_PinnedBuffer(arrays, rows, device) for _ in range(2)]
        self._turn = 0

    def send(self, rows: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Copy rows start to stop of some arrays to the device, while it works on earlier rows.

        Returns:
            Tensors (stop - start, ...) on the device, for use in the current stream. Call `release` after use.
        """
        buffer, count = self._buffers[self._turn], stop - start
        # before that, the device may still be reading the pinned memory
        buffer.copied.synchronize()
        for name, array in rows.items():
            buffer.pinned[name][:count].copy_(array[start:stop])
        with self._module.stream(self._stream):
            self._stream.wait_event(buffer.read)
            for name in rows:
                buffer.on_device[name][:count].copy_(buffer.pinned[name][:count], non_blocking=True)
            buffer.copied.record(self._stream)
        self._module.current_stream().wait_event(buffer.copied)
        return {name: buffer.on_device[name][:count] for name in rows}

    def release(self) -> None:
        """Allow later copies to overwrite the last result of `send` once the current stream's work so far is done."""
        self._buffers[self._turn].read.record(self._module.current_stream())
        self._turn = 1 - self._turn


class _PinnedBuffer:
    """Pinned memory, memory of the same shape on the device, and events that say when either is free again."""

    def __init__(self, arrays: Arrays, rows: int, device: torch.device) -> None:
        pin, event = device.type == "cuda", torch.get_device_module(device).Event
        self.pinned = {
            name: torch.empty(rows, *shape, dtype=dtype, pin_memory=pin) for name, (shape, dtype) in arrays.items()
        }
        self.on_device = {name: torch.empty_like(array, device=device) for name, array in self.pinned.items()}
        self.copied, self.read = event(), event()
