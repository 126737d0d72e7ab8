"""Pinned memory: rows are copied to a GPU while it scores those before.

`mixencoder.ranking.candidate_buffer` is the caller. Also runs on a CPU, where copies are made at once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Arrays = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""For every array the shape of a row, and its dtype."""


class Staging:
    """Pinned memory through which rows travel to a device: one half is filled while the other is on its way.

    Args:
        arrays: what travels.
        rows: the most rows of a transfer.
        device: where rows go.
    """

    def __init__(self, arrays: Arrays, rows: int, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._halves = [_Half(arrays, rows, device) for _ in range(2)]
        self._turn = 0

    def send(self, rows: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Copy rows start to stop of some arrays to the device, while it works on what it was given before.

        Returns:
            Tensors (stop - start, ...) there, ready for the current stream and to be given back by `release`.
        """
        half, count = self._halves[self._turn], stop - start
        # until then the device may still read the pinned half
        half.copied.synchronize()
        for name, array in rows.items():
            half.pinned[name][:count].copy_(array[start:stop])
        with self._module.stream(self._stream):
            self._stream.wait_event(half.read)
            for name in rows:
                half.near[name][:count].copy_(half.pinned[name][:count], non_blocking=True)
            half.copied.record(self._stream)
        self._module.current_stream().wait_event(half.copied)
        return {name: half.near[name][:count] for name in rows}

    def release(self) -> None:
        """Say that all reading of what `send` returned last is under way on the current stream."""
        self._halves[self._turn].read.record(self._module.current_stream())
        self._turn = 1 - self._turn


class _Half:
    """Pinned memory, its counterpart on the device, and what has happened to them."""

    def __init__(self, arrays: Arrays, rows: int, device: torch.device) -> None:
        pin, event = device.type == "cuda", torch.get_device_module(device).Event
        self.pinned = {
            name: torch.empty(rows, *shape, dtype=dtype, pin_memory=pin) for name, (shape, dtype) in arrays.items()
        }
        self.near = {name: torch.empty_like(array, device=device) for name, array in self.pinned.items()}
        self.copied, self.read = event(), event()
