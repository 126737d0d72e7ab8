"""CUDA graphs: record kernels once and replay them, so that the GPU does not wait for the CPU to launch each one.

`mixencoder.ranking.candidate_buffer` is the caller. On other devices the functions just run.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_RECORDING = threading.Lock()


def graphs_allowed() -> bool:
    """Return whether kernels may be recorded: yes, unless MIXENCODER_GRAPHS=0."""
    return os.environ.get("MIXENCODER_GRAPHS", "1") != "0"


class CudaGraphs:
    """Records functions as CUDA graphs at their first call and replays them afterwards. For one thread at a time.

    A function must read the same memory at every call, and must not wait for results of the GPU (as ``.item()`` does).
    The next call of any function overwrites the tensor that this call returned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def call(self, key: Any, function: Callable[[], Tensor]) -> Tensor:
        """Call a function, or replay the one that was recorded under this key; the key must identify the function.

        Raises:
            RuntimeError: the function cannot be recorded; with MIXENCODER_GRAPHS=0 it may still run.
        """
        if self._device.type != "cuda":
            return function()
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(function)
            except RuntimeError as error:
                self._end_recording()
                error.add_note("recording a CUDA graph failed; set MIXENCODER_GRAPHS=0 to run without CUDA graphs")
                raise
        graph, result = self._recorded[key]
        graph.replay()
        return result

    def _end_recording(self) -> None:
        """After a failed recording, record something simple: until then the device's random numbers do not work."""
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
            # a first run outside the recording: kernels are compiled, and libraries allocate their memory
            with torch.cuda.stream(aside):
                function()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on using the GPU
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        return graph, result
