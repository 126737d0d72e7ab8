"""The attention kernels' launch rule. What the launches take of a GPU is tested in test_resources.py."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels.attention.triton_launch import (
    RESIDENT,
    TABLE,
    Kind,
    alternatives,
    forward_options,
    keeps_short_queries,
    rule,
)
from mixkernels.triton_common.support import HEAD_DIMS, MAX_CONTEXT

FORWARD = ("forward", RESIDENT)
KERNELS = (*FORWARD, "backward_candidates", "backward_shared")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_holds_whole_candidates_and_wastes_few_rows(kernel, head_dim, itemsize):
    for slots in range(1, MAX_CONTEXT + 2):
        if slots == 17 and (kernel, head_dim, itemsize) == ("backward_candidates", 128, 4):
            continue  # refused
        config = rule(Kind(kernel, max(slots - 1, 1), slots, head_dim, itemsize))
        # the forward kernels' state rows are a tile of their own
        rows = max(slots - 1, 1) if kernel in FORWARD else slots
        candidates = config.block_m // rows
        assert candidates >= 1
        # Triton's tiles are powers of two, and its products want 16
        assert config.block_m & (config.block_m - 1) == 0
        assert config.block_n >= 16
        assert config.block_n & (config.block_n - 1) == 0
        # 32 rows hold one candidate of 17 rows; a full tensor core's tile wastes a quarter at most
        assert candidates * rows >= (0.75 if config.block_m >= 64 else 0.5) * config.block_m


@pytest.mark.parametrize("kernel", KERNELS)
def test_tuning_tries_the_rule_first_and_nothing_twice(kernel):
    kind = Kind(kernel, 1, 2, 64, 2)
    tried = alternatives(kind)
    assert tried[0] == rule(kind)
    assert len(set(tried)) == len(tried) > 1
    # a tile that holds no whole candidate would be silently wrong
    assert all(config.block_m >= kind.slots for config in tried)


@pytest.mark.parametrize(
    ("capability", "hip", "wanted"), [((9, 0), None, True), ((8, 0), None, False), ((9, 0), "7", False)]
)
def test_short_queries_stay_on_the_chip_where_that_was_measured(monkeypatch, capability, hip, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert keeps_short_queries.__wrapped__(torch.device("cuda:0")) is wanted
    # interpreted kernels are tested in both forms
    assert keeps_short_queries(torch.device("cpu"))


@pytest.mark.parametrize("num_keys", [1, 16, 17, 100, 128])
def test_a_resident_query_is_one_block_and_others_are_cut(num_keys):
    kind = Kind(RESIDENT, 1, 2, 64, 2)
    block = forward_options(kind, rule(kind), num_keys)["BLOCK_N"]
    assert num_keys <= block < max(2 * num_keys, 17)
    streamed = kind._replace(kernel="forward")
    assert forward_options(streamed, rule(streamed), num_keys)["BLOCK_N"] == rule(streamed).block_n


def test_measured_configurations_are_of_kinds_that_are_launched():
    for kinds in TABLE.values():
        assert all(kind.kernel in KERNELS and config in alternatives(kind) for kind, config in kinds.items())
