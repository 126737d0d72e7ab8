"""What the torch path must not cost, counted instead of timed: operator calls, and bytes allocated between them."""

from dataclasses import dataclass
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.formulations import ours
from benchmarks.measuring.formulations import Inputs

CANDIDATES = 1000


@dataclass
class Traffic:
    calls: int
    allocated: int
    """Bytes, whether or not they were given back."""


@cache
def traffic(candidates: int, k: int) -> Traffic:
    inputs = Inputs.random(candidates, k, 64, 12, 64, torch.float32)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        ours(inputs, "torch")
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in events)
    return Traffic(len(events), allocated)


def test_candidates_cost_no_calls_of_their_own():
    # work comes in slabs of some hundred candidates
    assert traffic(CANDIDATES, 4).calls <= CANDIDATES / 2
    assert traffic(CANDIDATES, 1).calls <= CANDIDATES / 2


def test_four_context_embeddings_allocate_at_most_six_times_as_much_as_one():
    # 5/2 the rows for shared keys, and 16 times the pairs of own ones, a key's dimension smaller than a row
    assert traffic(CANDIDATES, 4).allocated <= 6 * traffic(CANDIDATES, 1).allocated


def test_less_is_allocated_than_expanded_keys_alone_would_take():
    expanded = CANDIDATES * 64 * 12 * 64 * 4
    assert traffic(CANDIDATES, 1).allocated <= expanded / 10
