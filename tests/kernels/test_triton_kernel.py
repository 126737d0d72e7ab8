"""The attention kernels' launch rule and bounds. What launches take of a GPU is tested in test_resources.py."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels import BackendError
from mixkernels.attention import triton_launch
from mixkernels.attention.checks import Call
from mixkernels.attention.triton_backward import candidate_attention_backward
from mixkernels.attention.triton_forward import candidate_attention, forward_kind
from mixkernels.attention.triton_launch import (
    CANDIDATES,
    FORWARD,
    KERNELS,
    SHORT,
    STREAMED,
    Kind,
    alternatives,
    forward_options,
    keeps_short_queries,
    launch_config,
    rule,
    slots_of,
    tables,
)
from mixkernels.triton_common.support import HEAD_DIMS, MAX_CONTEXT
from tests.kernels.attention_cases import INPUTS, Case, device_of


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heavy", [False, True])
def test_every_launch_holds_whole_candidates_and_wastes_few_rows(kernel, head_dim, itemsize, heavy):
    for k, state in product(range(1, MAX_CONTEXT + 1), (True, False)):
        slots = slots_of(kernel, k, has_state=state)
        if slots == 17 and (kernel, head_dim, itemsize) == (CANDIDATES, 128, 4):
            continue  # refused
        config = rule(Kind(kernel, k, slots, head_dim, itemsize, quantised=heavy, lse=heavy))
        candidates = config.block_m // slots
        assert candidates >= 1
        # Triton's tiles are powers of two, and its products want 16
        assert config.block_m & (config.block_m - 1) == 0
        assert config.block_n >= 16
        assert config.block_n & (config.block_n - 1) == 0
        if kernel in FORWARD:
            # a power of two: a candidate's own keys lie in one group of 16 columns, which its bits depend on. That
            # wastes up to half of the rows but one, of which a state takes one; no slot is ever a multiple too many
            assert slots & (slots - 1) == 0
            assert slots < 2 * (k + (state and slots > k))
            assert slots * candidates == config.block_m
        else:
            # 32 rows hold one candidate of 17 rows; a full tensor core's tile wastes a quarter at most
            assert candidates * slots >= (0.75 if config.block_m >= 64 else 0.5) * config.block_m


@pytest.mark.parametrize("kernel", KERNELS)
def test_tuning_tries_the_rule_first_and_nothing_twice(kernel):
    kind = Kind(kernel, 1, 2, 64, 2)
    tried = alternatives(kind)
    assert tried[0] == rule(kind)
    assert len(set(tried)) == len(tried) > 1
    # a tile that holds no whole candidate would be silently wrong
    assert all(config.block_m >= kind.slots for config in tried)


def test_tuning_times_nothing_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setenv("MIXKERNELS_TUNING", "1")
    monkeypatch.setattr(triton_launch, "_name_of", lambda device: "a GPU")
    monkeypatch.setattr(triton_launch, "_milliseconds", lambda launch, config: config.block_n)
    monkeypatch.setattr(triton_launch, "_TUNED", {})
    kind, device = Kind(STREAMED, 1, 2, 64, 2), torch.device("cuda:0")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(
        BackendError, match=r"MIXKERNELS_TUNING=1.*CUDA graph.*forward_streamed, k=1, D=64.*before recording"
    ):
        launch_config(kind, device, lambda config: None)
    capturing = False
    fastest = launch_config(kind, device, lambda config: None)
    assert fastest.block_n == 32
    # what was timed before can be recorded
    capturing = True
    assert launch_config(kind, device, lambda config: None) == fastest


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
def test_a_short_query_is_one_block_and_others_are_cut(num_keys):
    kind = Kind(SHORT, 1, 1, 64, 2)
    block = forward_options(kind, rule(kind), num_keys)["BLOCK_N"]
    assert num_keys <= block < max(2 * num_keys, 17)
    streamed = kind._replace(kernel=STREAMED)
    assert forward_options(streamed, rule(streamed), num_keys)["BLOCK_N"] == rule(streamed).block_n


def test_tables_are_of_kinds_that_are_launched():
    for table in tables():
        assert table.source
        for kind, config in table.configurations.items():
            slots = {slots_of(kind.kernel, kind.num_context, has_state=state) for state in (True, False)}
            assert kind.kernel in KERNELS
            assert kind.slots in slots
            assert config.block_m >= kind.slots
            assert kind.kernel not in FORWARD or config.block_m % kind.slots == 0


def unchecked_call(case: Case) -> Call:
    """Return a case as the launchers get it, without the checks of the public operator."""
    device = device_of("triton")
    named = {name: None if case[name] is None else case[name].to(device) for name in INPUTS}
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    rest = dict.fromkeys(Call._fields) | named
    return Call(**rest | {"key_lengths": lengths})


@pytest.mark.parametrize(
    ("dtype", "k", "form"),
    [(torch.bfloat16, 1, "pool"), (torch.bfloat16, 1, "per query"), (torch.float32, 2, "pool")],
    ids=["short", "fused backward", "streamed"],
)
def test_lengths_beyond_the_keys_or_below_0_read_no_other_memory(dtype, k, form):
    # keys are slices of longer ones, whose other tokens must not be read
    case = Case.random(n=5, k=k, m=40, b=4, d=16, dtype=dtype, form=form)
    case = case.changed(**{name: case[name][:, 8:16] for name in ("key", "value")})
    found = []
    for lengths in ([9, 40, 2**32 + 3, -1], [8, 8, 8, 0]):
        case.lengths = lengths
        call = unchecked_call(case)
        short = forward_kind(call, return_lse=True).kernel == SHORT
        assert short == (k == 1 and keeps_short_queries(call.key.device))
        results = candidate_attention(call, scale=0.25, return_lse=True)
        grads = [torch.ones_like(result) for result in results[:2]]
        gradients = candidate_attention_backward([*grads, None, None], list(results), call, scale=0.25, for_shared=True)
        found.append([t for t in (*results, *gradients) if t is not None])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
