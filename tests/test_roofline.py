"""The cost model against hand counts and the figures of docs/design.md."""

import torch

from mixkernels.roofline import Peaks, candidate_attention_cost, measured_cpu_peaks


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
    many = candidate_attention_cost(10**6, 1, 64, 12, 64, torch.bfloat16)
    assert round(many.bytes / 10**6 / 768) == 12


def test_a_pool_is_read_once_for_all_queries():
    one = candidate_attention_cost(100, 1, 8, 2, 16, torch.float32, batch=1)
    two = candidate_attention_cost(100, 1, 8, 2, 16, torch.float32, batch=2)
    assert two.flops == 2 * one.flops
    # the second query adds its keys and its outputs alone
    assert two.bytes - one.bytes == (2 * 8 + 200) * 2 * 16 * 4


def test_the_slowest_limit_counts():
    cost = candidate_attention_cost(10, 1, 8, 1, 16, torch.float32)
    peaks = Peaks(flops=1e12, bytes=1.0, exps=1e12)
    assert cost.seconds(peaks) == cost.bytes


def test_measured_peaks_are_positive_and_remembered():
    peaks = measured_cpu_peaks()
    assert min(peaks) > 1e6
    assert measured_cpu_peaks() is peaks
