"""The cost model against hand counts and the figures of docs/design.md, and the peaks that it is compared with."""

import pytest
import torch

from mixkernels import DeviceError
from mixkernels.devices import device_peaks, known_peaks, multiplies_natively
from mixkernels.roofline import (
    Cost,
    Peaks,
    candidate_attention_backward_cost,
    candidate_attention_cost,
    gate_layer_norm_cost,
    measured_cpu_peaks,
    residual_layer_norm_cost,
    score_candidates_cost,
)

BF16 = torch.bfloat16


def test_bytes_and_flops_equal_a_hand_count():
    # N=2, k=3, m=5, H=1, D=4: 6 context rows, 2 state rows
    cost = candidate_attention_cost(2, 3, 5, 1, 4, torch.float32)
    logits = 8 * 5 + 6 * 3
    assert cost.exps == logits
    assert cost.flops == 4 * 4 * logits
    # read Q (8 rows), own K and V (6 each), shared K and V (5 each); write 8 rows
    assert cost.bytes == (8 + 6 + 6 + 5 + 5 + 8) * 4 * 4


def test_a_candidate_moves_12_d_bytes_in_bfloat16_at_k_1():
    # docs/design.md, section 2: Q, K, V, O of one context row and Q, O of the state row, 2 bytes each
    many = candidate_attention_cost(10**6, 1, 64, 12, 64, BF16)
    assert round(many.bytes / 10**6 / 768) == 12


def test_a_pool_is_read_once_for_all_queries():
    one = candidate_attention_cost(100, 1, 8, 2, 16, torch.float32, batch=1)
    two = candidate_attention_cost(100, 1, 8, 2, 16, torch.float32, batch=2)
    assert two.flops == 2 * one.flops
    # the second query adds its keys and its outputs alone
    assert two.bytes - one.bytes == (2 * 8 + 200) * 2 * 16 * 4


def test_candidates_of_each_query_are_read_once_each():
    pool = candidate_attention_cost(100, 3, 8, 2, 16, torch.float32, batch=2)
    per_query = candidate_attention_cost(100, 3, 8, 2, 16, torch.float32, batch=2, form="per_query")
    assert per_query.flops == pool.flops
    # Q, K, V of 3 context rows and Q of the state row, for 100 candidates more
    assert per_query.bytes - pool.bytes == 100 * (3 * 3 + 1) * 2 * 16 * 4


def test_gathered_repeats_read_no_more_than_the_pool_and_ids_are_read_too():
    per_query = candidate_attention_cost(100, 1, 8, 2, 16, BF16, batch=2, form="per_query")
    distinct = candidate_attention_cost(100, 1, 8, 2, 16, BF16, batch=2, form="gathered")
    assert distinct.bytes - per_query.bytes == 200 * 8
    assert distinct.flops == per_query.flops
    repeats = candidate_attention_cost(100, 1, 8, 2, 16, BF16, batch=2, form="gathered", pool_size=10)
    assert distinct.bytes - repeats.bytes == (200 - 10) * 4 * 2 * 16 * 2


def test_ragged_rows_count_over_all_queries_together():
    # 200 rows of two queries, in any division, are 100 of each
    ragged = candidate_attention_cost(200, 3, 8, 2, 16, BF16, batch=2, form="ragged")
    per_query = candidate_attention_cost(100, 3, 8, 2, 16, BF16, batch=2, form="per_query")
    assert ragged.flops == per_query.flops
    assert ragged.bytes - per_query.bytes == 3 * 8  # offsets
    gathered = candidate_attention_cost(200, 3, 8, 2, 16, BF16, batch=2, form="ragged_gather")
    assert gathered.bytes - ragged.bytes == 200 * 8


def test_stored_own_logits_spare_own_keys():
    stored = candidate_attention_cost(10**6, 1, 64, 12, 64, BF16, own_logits=True)
    full = candidate_attention_cost(10**6, 1, 64, 12, 64, BF16)
    # docs/design.md, section 2: 10 d in place of 12 d, and a float32 logit a head
    assert full.bytes - stored.bytes == 10**6 * (2 * 768 - 4 * 12)
    assert full.flops - stored.flops == 10**6 * 12 * 2 * 64
    assert full.exps == stored.exps


def test_int8_candidates_move_half_the_bytes_and_their_scales():
    int8 = candidate_attention_cost(1000, 3, 8, 12, 64, BF16, int8=True)
    full = candidate_attention_cost(1000, 3, 8, 12, 64, BF16)
    # Q, K, V of a context row: a byte less an element, a scale more a head
    assert full.bytes - int8.bytes == 3000 * 3 * (768 - 4 * 12)


def test_log_sum_exps_are_written_only_if_asked_for():
    without = candidate_attention_cost(10, 3, 8, 2, 16, BF16)
    assert candidate_attention_cost(10, 3, 8, 2, 16, BF16, return_lse=True).bytes - without.bytes == 40 * 2 * 4


@pytest.mark.parametrize("changes", [{"form": "stacked"}, {"pool_size": 5}, {"form": "ragged", "pool_size": 5}])
def test_a_form_that_does_not_exist_is_an_error(changes):
    with pytest.raises(ValueError, match="form is"):
        candidate_attention_cost(10, 1, 8, 2, 16, BF16, **changes)


def test_the_backward_pass_equals_a_hand_count():
    # N=2, k=3, m=5, H=1, D=4: 6 context rows, 2 state rows
    cost = candidate_attention_backward_cost(2, 3, 5, 1, 4, torch.float32)
    logits = 8 * 5 + 6 * 3
    assert cost.exps == logits
    assert cost.flops == 10 * 4 * logits
    # 8 Q, 12 own and 10 shared rows, all with gradients; 8 O and 8 dO; a log-sum-exp a row
    assert cost.bytes == (2 * (8 + 12 + 10) + 16) * 4 * 4 + 8 * 4


def test_gradients_of_stored_own_logits_spare_own_keys():
    full = candidate_attention_backward_cost(10, 3, 8, 2, 16, BF16)
    stored = candidate_attention_backward_cost(10, 3, 8, 2, 16, BF16, own_logits=True)
    # own keys and their gradients against logits (3 x 3 a candidate and head) and theirs
    assert full.bytes - stored.bytes == 2 * 30 * 32 * 2 - 2 * 30 * 3 * 2 * 4
    assert full.flops - stored.flops == 6 * 16 * (2 * 30 * 3)


def test_the_layer_operators_equal_hand_counts():
    assert residual_layer_norm_cost(10, 4, BF16) == Cost(flops=320, bytes=(3 * 40 + 8) * 2, exps=0)
    assert gate_layer_norm_cost(10, 4, BF16) == Cost(flops=520, bytes=(4 * 40 + 8) * 2, exps=40)
    assert gate_layer_norm_cost(10, 4, BF16, has_state=False).bytes == (3 * 40 + 8) * 2
    # 10 candidates of 3 + 1 rows of 4, each with its residual
    scores = score_candidates_cost(10, 3, 4, BF16)
    assert scores == Cost(flops=8 * 160 + 10 * 5 * 4, bytes=(320 + 8) * 2 + 40, exps=0)
    assert score_candidates_cost(10, 3, 4, BF16, additive=True).bytes == scores.bytes + 40
    assert score_candidates_cost(10, 3, 4, BF16, top_k=2).bytes == scores.bytes - 40 + 2 * 12


def test_the_slowest_limit_counts():
    cost = candidate_attention_cost(10, 1, 8, 1, 16, torch.float32)
    assert cost.seconds(Peaks(flops=1e12, bytes=1.0, exps=1e12)) == cost.bytes
    assert cost.bound(Peaks(flops=1e12, bytes=1.0, exps=1e12)) == "memory"
    assert cost.bound(Peaks(flops=1.0, bytes=1e12, exps=1e12)) == "matrix units"
    assert cost.bound(Peaks(flops=1e12, bytes=1e12, exps=1.0)) == "exponentials"


def test_costs_of_calls_in_a_row_add_up():
    assert Cost(1, 2, 3).and_then(Cost(10, 20, 30)) == Cost(11, 22, 33)


def test_an_h100_needs_2_75_ms_for_a_million_candidates():
    # the floor that docs/design.md, section 2, names
    cost = candidate_attention_cost(10**6, 1, 64, 12, 64, BF16)
    peaks = known_peaks("NVIDIA H100 80GB HBM3", BF16)
    assert cost.seconds(peaks) == pytest.approx(2.75e-3, rel=5e-3)
    assert cost.bound(peaks) == "memory"


def test_exponentials_take_57_percent_of_the_memory_time_at_narrow_heads():
    peaks = known_peaks("NVIDIA H100 80GB HBM3", BF16)
    limits = candidate_attention_cost(10**5, 1, 128, 24, 32, BF16).limits(peaks)
    assert limits["exponentials"] / limits["memory"] == pytest.approx(0.57, abs=0.02)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989e12, 3.35e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, False, 989e12, 3.35e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, False, 67e12, 3.35e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, True, 495e12, 3.35e12),
        ("NVIDIA H200", torch.bfloat16, False, 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312e12, 2.04e12),
    ],
)
def test_a_known_gpu_is_found_by_its_name(name, dtype, tf32, flops, bandwidth):
    peaks = known_peaks(name, dtype, tf32=tf32)
    assert (peaks.flops, peaks.bytes) == (flops, bandwidth)


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 NVL"])
def test_a_sibling_with_other_figures_is_not_taken_for_a_known_gpu(name):
    assert known_peaks(name, BF16) is None


def test_a_device_that_is_neither_known_nor_here_is_an_error():
    with pytest.raises(DeviceError, match="known one: H100 SXM, H200, A100 80GB"):
        device_peaks("H900", BF16)
    with pytest.raises(DeviceError, match="cannot be measured"):
        device_peaks("meta", BF16)
    with pytest.raises(DeviceError, match="float64"):
        device_peaks("H100 SXM", torch.float64)


def test_measured_peaks_are_positive_and_remembered():
    peaks = measured_cpu_peaks()
    assert min(peaks) > 1e6
    assert measured_cpu_peaks() is peaks


def test_a_cpu_that_emulates_a_precision_is_limited_by_float32():
    for dtype in (torch.bfloat16, torch.float16):
        peaks, source = device_peaks("cpu", dtype)
        assert peaks == measured_cpu_peaks(dtype if multiplies_natively(dtype) else torch.float32)
        assert source.startswith("CPU, measured")


@pytest.mark.gpu
def test_a_measured_gpu_stays_near_its_data_sheet():
    name = torch.cuda.get_device_name()
    measured, source = device_peaks("cuda", BF16, measured=True)
    assert min(measured) > 1e9
    assert source.endswith("measured")
    if (sheet := known_peaks(name, BF16)) is not None:
        # no library exceeds the sheet, and none is off by a factor
        for got, published in zip(measured, sheet, strict=True):
            assert 0.4 * published < got < 1.1 * published
