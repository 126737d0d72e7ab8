"""The context that inference runs in: evaluation mode, no gradients, no autocast, no default device.

Every public method that computes has the decorator `inference`. PyTorch's default dtype belongs to the process, not to
a thread, so it cannot be changed for one call: code that makes tensors gives their dtype instead.
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
    """An object whose methods compute with a model."""

    @property
    def model(self) -> Any:
        """The torch module."""


S = TypeVar("S", bound=HasModel)


def inference(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorate a method of an engine to run in the `inference_context` of its model."""

    @functools.wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with inference_context(self.model):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def inference_context(model: nn.Module) -> Generator[None]:
    """Run code with a model in evaluation mode, without gradients, autocast or a default device.

    Afterwards modules that were in training mode return to it; if several threads use the model, when the last one
    ends. So do not train a model in one thread while another ranks with it.

    Raises:
        ForkedProcessError: this process was forked from one that had computed with threads.
    """
    if _ACTIVE.call_of(model) is not None:
        # a method called another method of the same model, in the same thread
        yield
        return
    _FORK_GUARD.check()
    device = next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for kind in {"cpu", device}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # torch.device as a context makes every PyTorch call slower, so enter it only if needed
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_state_of(model).use())
        call = _Call(model)
        _ACTIVE.calls.append(call)
        stack.callback(_ACTIVE.calls.remove, call)
        yield


class _Call:
    """An outermost call of a model's engine."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[str, Any] = {}
        """What `once_a_call` has computed, by name."""


class _ActiveCalls(threading.local):
    """The calls that the current thread is in, one for each model."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def call_of(self, model: nn.Module) -> _Call | None:
        """Return the call of a model's engine, or None."""
        return next((call for call in self.calls if call.model is model), None)


_ACTIVE = _ActiveCalls()


class _InferenceState:
    """What holds for a model while at least one thread is in its `inference_context`.

    Modules that were in training mode are put back into it when the last thread has finished.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._users = 0
        self._to_restore: list[nn.Module] = []
        self.shared: Any = None
        """See `shared_by_passes`."""

    @contextmanager
    def use(self) -> Generator[None]:
        """Put the model into evaluation mode while at least one thread is in this context."""
        with self._lock:
            self._users += 1
            for module in _training_modules(self._model()):
                module.training = False
                self._to_restore.append(module)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.shared = None
                    for module in self._to_restore:
                        module.training = True
                    self._to_restore.clear()


_STATES: "weakref.WeakKeyDictionary[nn.Module, _InferenceState]" = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def _state_of(model: nn.Module) -> _InferenceState:
    # one for each model, as several engines may share it
    with _STATES_LOCK:
        state = _STATES.get(model)
        if state is None:
            state = _STATES[model] = _InferenceState(model)
        return state


def shared_by_passes(model: nn.Module, compute: Callable[[], R]) -> R | None:
    """Return compute's result for a model, which is computed again in every outermost call of its engine.

    For what a call's passes share, and what must not be used after the weights have changed between two calls. All
    callers must compute the same. In other threads that run a call's passes, this returns what the caller's thread
    computed before; outside of any call it returns None.
    """
    state = _state_of(model)
    if _ACTIVE.call_of(model) is not None:
        state.shared = once_a_call(model, "shared by passes", compute)
    return state.shared


def once_a_call(model: nn.Module, name: str, compute: Callable[[], R]) -> R:
    """Return compute's result; within an outermost call of a model's engine it is computed once, by its name."""
    call = _ACTIVE.call_of(model)
    if call is None:
        return compute()
    if name not in call.values:
        call.values[name] = compute()
    return call.values[name]


def _training_modules(model: nn.Module | None) -> list[nn.Module]:
    """Return the modules in training mode; parts may be in it even if the whole model is not."""
    found: list[nn.Module] = []
    modules: list[nn.Module | None] = [model]
    # this runs at every call, and takes a fraction of the time of Module.modules, which builds all names
    for module in modules:
        if module is None:
            continue
        if module.training:
            found.append(module)
        modules += module._modules.values()
    return found


class _ForkGuard:
    """Notes whether this process lost PyTorch's threads in a fork, and then raises instead of letting it hang."""

    def __init__(self) -> None:
        self._threads_ran = False
        self._threads_lost = False
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._threads_lost = self._threads_lost or self._threads_ran

    def check(self) -> None:
        """Raise if a computation would wait for threads that this process does not have.

        A fork copies only the thread that called it. The other threads of OpenMP are gone, but the copied memory says
        that they exist. It makes no difference in which process the model was loaded.

        Raises:
            ForkedProcessError: it would.
        """
        if torch.get_num_threads() == 1:
            return
        if self._threads_lost:
            raise ForkedProcessError(
                f"process {os.getpid()} was forked from one in which a model has computed with several threads; these "
                "threads do not exist here, and a computation would wait for them for ever. Start processes with the "
                'method "spawn" or "forkserver", or fork before the first computation, or call '
                "torch.set_num_threads(1) in the child first"
            )
        self._threads_ran = True


_FORK_GUARD = _ForkGuard()
