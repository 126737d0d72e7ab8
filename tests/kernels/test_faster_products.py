"""Whether another dtype's products are worth it: decided by time, and only where there are instructions."""

import pytest
import torch

from mixkernels import devices


@pytest.fixture
def faster(monkeypatch):
    """Return the function without its memory, with times that a test sets: float32's first."""

    def decide(times: list[float], *, native: bool = True) -> bool:
        monkeypatch.setattr(devices, "multiplies_natively", lambda dtype: native)
        monkeypatch.setattr(devices, "_best_seconds", lambda call, repeats: times.pop(0))
        return devices.multiplies_faster.__wrapped__(torch.bfloat16, "cpu")

    return decide


def test_bfloat16_is_worth_it_where_it_takes_clearly_less_time(faster):
    assert faster([1.0, 0.5])
    # as Intel's AVX-512 without AMX
    assert not faster([1.0, 2.0])
    # too little for its rounding
    assert not faster([1.0, 0.9])


def test_nothing_is_timed_where_the_processor_emulates(faster):
    assert not faster([], native=False)


def test_other_devices_are_not_timed_on_the_cpu():
    assert not devices.multiplies_faster(torch.bfloat16, "mps")


def test_the_answer_is_measured_once_and_reads_no_default(monkeypatch):
    devices.multiplies_faster.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        first = devices.multiplies_faster(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(devices, "_best_seconds", None)
    assert devices.multiplies_faster(torch.bfloat16) == first
