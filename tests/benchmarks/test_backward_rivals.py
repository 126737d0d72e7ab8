"""Rivals of a training step through fused backward passes compute the gradients of candidate attention."""

import pytest
import torch

from benchmarks.gpu import backward_rivals
from benchmarks.gpu.attention import Shape, gradients, random_step, reference_gradients, relative_error
from benchmarks.gpu.backward_rivals import (
    flex_batch,
    one_call_prepare,
    one_call_rivals,
    training_rivals,
    two_pass_batch,
)
from benchmarks.gpu.formulations import UnavailableError, fused_attention, ours, own_products
from benchmarks.measuring.formulations import Inputs

SHAPES = [Shape(7, 1, 5, 16, h=2), Shape(6, 3, 5, 16, h=2, batch=3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_fused_backward_pass_gives_the_shared_part_of_all_gradients(shape):
    step = random_step(shape, torch.float64, "cpu")

    def forward(*tensors):
        return two_pass_batch(*tensors, fused="flash")

    assert relative_error(gradients(forward, step), reference_gradients(step)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_flex_attention_of_a_batch_gives_the_gradients(shape):
    from torch.nn.attention.flex_attention import flex_attention

    step = random_step(shape, torch.float64, "cpu")

    def attend(query, key, value, *, block_mask, kernel_options):
        # FlexAttention has no gradients on a CPU: the mask of its blocks, dense
        rows, columns = (torch.arange(size) for size in (query.shape[2], key.shape[2]))
        seen = block_mask.mask_mod(None, None, rows[:, None], columns[None, :])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)

    assert flex_attention is not None
    assert relative_error(gradients(flex_batch(attend), step), reference_gradients(step)) < 1e-10


@pytest.mark.parametrize("k", [1, 3])
def test_contexts_and_states_in_one_call(k):
    inputs = Inputs.random(7, k, 5, 2, 16, torch.float32)
    found = one_call_prepare(inputs, fused_attention, own_products)()
    assert relative_error(found, ours(inputs, "reference")) < 1e-5


def test_a_rival_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(backward_rivals.importlib.util, "find_spec", lambda name: None)
    inputs = Inputs.random(7, 1, 5, 2, 16, torch.float32)
    with pytest.raises(UnavailableError, match=r"FlashAttention 3.*not installed"):
        one_call_rivals()["one-call-flash3"](inputs)
    names = set(training_rivals(compile_too=True))
    assert names == {"two-pass-flash", "two-pass-cudnn", "two-pass-flash-compiled", "two-pass-cudnn-compiled"} | {
        "flex-compiled"
    }
