"""Work on a GPU without waiting for the CPU: kernels recorded once and replayed, rows copied while others are scored.

`mixencoder.ranking.candidate_buffer` is the caller. Everything here also runs on a CPU, where nothing is recorded and copies are at once.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Arrays = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""For every array the shape of a row, and its dtype."""

_RECORDING = threading.Lock()


def replays_wanted() -> bool:
    """Return whether kernels may be recorded: unless MIXENCODER_GRAPHS=0."""
    return os.environ.get("MIXENCODER_GRAPHS", "1") != "0"


class Replays:
    """Functions recorded as CUDA graphs at their first call and replayed afterwards; one thread at a time uses them.

    What a function reads must stay where it is, and it must not ask the GPU for anything. What it returns is written
    over by the next call of any function.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def call(self, key: Any, function: Callable[[], Tensor]) -> Tensor:
        """Return what the function returns, which is the same one whenever the key is the same.

        Raises:
            RuntimeError: the GPU refused to record; without recording (MIXENCODER_GRAPHS=0) it may still run.
        """
        if self._device.type != "cuda":
            return function()
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(function)
            except RuntimeError as error:
                self._end_recording()
                error.add_note("recording failed; set MIXENCODER_GRAPHS=0 to have every kernel launched by itself")
                raise
        graph, result = self._recorded[key]
        graph.replay()
        return result

    def _end_recording(self) -> None:
        """Record something that can be, which a device's random numbers need to leave a recording that failed."""
        graph = torch.cuda.CUDAGraph()
        with (
            suppress(RuntimeError),
            _RECORDING,
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=self._device)

    def _record(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        with _RECORDING, torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            # kernels are compiled and libraries take their memory before anything is recorded
            with torch.cuda.stream(aside):
                function()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # other threads go on with their own work
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        return graph, result


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
