"""What a GPU's pieces rest on: rows that travel by way of pinned memory, and functions recorded once."""

import pytest
import torch

from mixencoder.ranking.cuda_graphs import CudaGraphs
from mixencoder.ranking.pinned_memory import Staging

ARRAYS = {"a": ((3,), torch.float16), "b": ((), torch.int64)}


def rows(count=20):
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(count, 3, generator=generator).half(),
        "b": torch.randint(99, (count,), generator=generator),
    }


class Clock:
    """Stands in for a GPU's module: streams that work only when waited for, at the latest possible moment."""

    def __init__(self):
        self.current = self.Stream(self)
        self.order = [self.current]

    class Stream:
        def __init__(self, clock):
            self.work = []

        def wait_event(self, event):
            # as it stands now: recording it again does not move the place waited for
            recorded = event.recorded
            self.work.append(lambda: Clock.Event.settle(recorded))

        def run(self):
            while self.work:
                self.work.pop(0)()

    class Event:
        def __init__(self):
            self.recorded = None

        def record(self, stream):
            done = []
            stream.work.append(lambda: done.append(True))
            self.recorded = stream, done

        def synchronize(self):
            self.settle(self.recorded)

        @staticmethod
        def settle(recorded):
            if recorded is not None:
                stream, done = recorded
                while not done:
                    stream.work.pop(0)()

    class Entered:
        def __init__(self, clock, stream):
            self.clock, self.stream = clock, stream

        def __enter__(self):
            self.clock.order.append(self.stream)

        def __exit__(self, *exception):
            self.clock.order.pop()

    def stream(self, stream):
        return self.Entered(self, stream)

    def current_stream(self):
        return self.order[-1]


@pytest.fixture
def clock(monkeypatch):
    """A device whose copies happen as late as they may."""
    clock = Clock()

    class Module:
        Event = Clock.Event
        stream, current_stream = clock.stream, clock.current_stream

        @staticmethod
        def Stream():  # noqa: N802
            return Clock.Stream(clock)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    copy = torch.Tensor.copy_

    def late(self, source, non_blocking=False):
        if not non_blocking:
            return copy(self, source)
        clock.order[-1].work.append(lambda: copy(self, source))
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", late)
    return clock


def test_rows_arrive_as_they_were_however_late_copies_are_made(clock):
    staging, sent, arrived = Staging(ARRAYS, 4, torch.device("cpu")), rows(), []
    for start in range(0, 20, 4):
        near = staging.send(sent, start, start + 4)
        # the device reads when it comes to it
        clock.current.work.append(lambda near=near: arrived.append({name: part.clone() for name, part in near.items()}))
        staging.release()
    clock.current.run()
    for name, array in sent.items():
        assert torch.equal(torch.cat([part[name] for part in arrived]), array)


def test_one_half_is_filled_while_the_other_is_on_its_way(clock):
    staging, sent = Staging(ARRAYS, 4, torch.device("cpu")), rows()
    staging.send(sent, 0, 4)
    staging.release()
    # nothing has been waited for yet
    staging.send(sent, 4, 8)
    assert len(clock.current.work) == 3
    assert torch.equal(staging._buffers[0].pinned["a"], sent["a"][:4])


def test_some_arrays_and_fewer_rows_may_travel():
    staging, sent = Staging(ARRAYS, 8, torch.device("cpu")), rows()
    near = staging.send({"b": sent["b"]}, 5, 8)
    assert list(near) == ["b"]
    assert torch.equal(near["b"], sent["b"][5:8])


@pytest.mark.gpu
def test_rows_arrive_on_a_gpu_that_is_busy():
    device, sent = torch.device("cuda"), rows(4000)
    staging, out = Staging(ARRAYS, 100, device), []
    busy = torch.randn(4096, 4096, device=device)
    for start in range(0, 4000, 100):
        near = staging.send(sent, start, start + 100)
        busy = busy @ busy * 1e-2
        out.append({name: part.clone() for name, part in near.items()})
        staging.release()
    for name, array in sent.items():
        assert torch.equal(torch.cat([part[name] for part in out]).cpu(), array)


@pytest.mark.gpu
def test_a_function_is_run_by_python_once_and_replayed_on_what_its_inputs_hold_then():
    graphs, calls = CudaGraphs(torch.device("cuda")), []
    number = torch.ones(5, device="cuda")

    def double():
        calls.append(1)
        return number * 2

    for value in (1.0, 2.0, 3.0):
        number.fill_(value)
        assert graphs.call("double", double).tolist() == [2 * value] * 5
    # to warm up, and to record
    assert len(calls) == 2


@pytest.mark.gpu
def test_what_cannot_be_recorded_says_how_to_go_on():
    graphs = CudaGraphs(torch.device("cuda"))
    number = torch.ones(5, device="cuda")
    with pytest.raises(RuntimeError) as caught:
        graphs.call("asks", lambda: number * number.sum().item())
    assert "MIXENCODER_GRAPHS=0" in caught.value.__notes__[0]
    # the device is as useful as before
    assert torch.randn(3, device="cuda").isfinite().all()
