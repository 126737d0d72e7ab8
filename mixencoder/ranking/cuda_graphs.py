"""CUDA graphs: kernels recorded once and replayed, so that a GPU does not wait for the CPU to launch them.

`mixencoder.ranking.candidate_buffer` is the caller. On a CPU functions simply run.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

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
