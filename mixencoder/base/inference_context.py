"""What inference runs in, whatever its caller has set: evaluation mode, no gradients, no autocast, the model's devices.

Every public method that computes goes through `inference`. A default dtype cannot be set aside for a while, as it
belongs to the process and not to the thread: code that makes tensors names their dtype instead.
"""

import functools
import os
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from mixencoder.errors import ForkedProcessError

P = ParamSpec("P")
R = TypeVar("R")


class HasModel(Protocol):
    """Whose methods compute with a model."""

    @property
    def model(self) -> Any:
        """The torch module."""


S = TypeVar("S", bound=HasModel)


def inference(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Have a method of an engine run in `surroundings` of its model."""

    @functools.wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with surroundings(self.model):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def surroundings(model: nn.Module) -> Generator[None]:
    """Compute with a model in evaluation mode, without gradients, autocast or a default device.

    The modules' modes are given back afterwards, by the last of several threads. So a model must not be trained in one
    thread while another ranks with it.

    Raises:
        ForkedProcessError: threads are missing in this process.
    """
    if model in _INSIDE.models:
        # a method that calls another one of the same model, in the same thread
        yield
        return
    _PROCESS.enter()
    device = next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for kind in {"cpu", device}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # a default device costs every call of PyTorch some time, so it is set aside only where there is one
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_mode_of(model).evaluation())
        _INSIDE.models.append(model)
        stack.callback(_INSIDE.models.remove, model)
        yield


class _Inside(threading.local):
    """The models in whose surroundings a thread is."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []


_INSIDE = _Inside()


class _Mode:
    """Which modules of a model are to train again once nobody infers any more."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._users = 0
        self._training: list[nn.Module] = []

    @contextmanager
    def evaluation(self) -> Generator[None]:
        with self._lock:
            self._users += 1
            for module in _training_modules(self._model()):
                module.training = False
                self._training.append(module)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    for module in self._training:
                        module.training = True
                    self._training.clear()


_MODES: "weakref.WeakKeyDictionary[nn.Module, _Mode]" = weakref.WeakKeyDictionary()
_MODES_LOCK = threading.Lock()


def _mode_of(model: nn.Module) -> _Mode:
    # several engines may share a model
    with _MODES_LOCK:
        mode = _MODES.get(model)
        if mode is None:
            mode = _MODES[model] = _Mode(model)
        return mode


def _training_modules(model: nn.Module | None) -> list[nn.Module]:
    """Return the modules in training mode; a part may be while the whole is not."""
    found: list[nn.Module] = []
    modules: list[nn.Module | None] = [model]
    # at every call: a walk of our own takes a fraction of the time of `modules`, which names them all
    for module in modules:
        if module is None:
            continue
        if module.training:
            found.append(module)
        modules += module._modules.values()
    return found


class _Process:
    """What a fork left of the threads that PyTorch computes with."""

    def __init__(self) -> None:
        self._threads_ran = False
        self._threads_lost = False
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._threads_lost = self._threads_lost or self._threads_ran

    def enter(self) -> None:
        """Refuse to wait for threads that this process does not have.

        A fork copies the thread that called it alone. OpenMP's others are gone, but the copied memory says that they
        are there, wherever the model was loaded.
        """
        if torch.get_num_threads() == 1:
            return
        if self._threads_lost:
            raise ForkedProcessError(
                f"process {os.getpid()} was forked from one in which a model has computed with several threads; these "
                "threads do not exist here, and a computation would wait for them for ever. Start processes by the "
                'method "spawn" or "forkserver", or fork before the first computation, or call '
                "torch.set_num_threads(1) in the child first"
            )
        self._threads_ran = True


_PROCESS = _Process()
