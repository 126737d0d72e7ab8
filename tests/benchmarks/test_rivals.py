"""The rivals of the benchmarks compute the same thing as the library: none is crippled, none is wrong."""

import pytest
import torch

from benchmarks.gpu.attention import Shape, gradients, random_step, reference_gradients, relative_error
from benchmarks.gpu.formulations import (
    BATCH_RIVALS,
    eager_rivals,
    flex_block_mask,
    flex_layout,
    flex_mask,
    flex_prepare,
    fused_attention,
    ours_batch,
    two_pass,
)
from benchmarks.gpu.layer import LAYER_OPERATORS
from benchmarks.measuring.formulations import RIVALS, Inputs, expand, sdpa_on_expanded
from benchmarks.measuring.timing import peak_bytes
from tests.benchmarks.gpu_cases import CPU
from tests.kernels.attention_oracle import attention_by_loops

CPU_RIVALS = {name: rival for name, rival in RIVALS.items() if "compiled" not in name}
CPU_RIVALS["sdpa-pre-expanded"] = lambda inputs: sdpa_on_expanded(inputs, *expand(inputs))


def check(result, inputs, tolerance):
    contexts = inputs.context_query, inputs.context_key, inputs.context_value
    shared = inputs.key.unsqueeze(0), inputs.value.unsqueeze(0)
    want = attention_by_loops(*contexts, inputs.state_query, *shared)[:2]
    for got, one in zip(result, want, strict=True):
        torch.testing.assert_close(got.double(), one[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", CPU_RIVALS)
def test_a_rival_on_a_cpu_computes_candidate_attention(name, k):
    inputs = Inputs.random(7, k, 5, 2, 16, torch.float64)
    check(CPU_RIVALS[name](inputs), inputs, 1e-10)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [name for name in eager_rivals() if name != "two-pass-cudnn"])
def test_a_rival_on_a_gpu_computes_candidate_attention(name, k):
    inputs = Inputs.random(7, k, 5, 2, 16, torch.float32)
    check(eager_rivals()[name](inputs)(), inputs, 1e-5)


@pytest.mark.parametrize("name", ["two-pass", "sdpa-expanded", "sdpa-pre-expanded"])
def test_chunks_join(name, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.formulations.GRID_LIMIT", 3)
    inputs = Inputs.random(7, 3, 5, 2, 16, torch.float32)
    check(eager_rivals()[name](inputs)(), inputs, 1e-5)


@pytest.mark.parametrize("fused_own", [True, False])
def test_two_passes_take_any_fused_attention(fused_own):
    inputs = Inputs.random(4, 2, 5, 2, 16, torch.float32)
    check(two_pass(inputs, attend=fused_attention, fused_own=fused_own), inputs, 1e-5)


@pytest.mark.parametrize(("n", "k", "m"), [(5, 1, 7), (200, 3, 64), (131, 2, 70), (300, 1, 130), (90, 10, 16)])
def test_flex_attention_meets_exactly_the_blocks_of_its_mask(n, k, m):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = flex_layout(n, k, m)
    keys = layout.own_start + layout.rows
    found = flex_block_mask(layout, CPU)
    block = (layout.row_block, layout.key_block)
    want = create_block_mask(flex_mask(layout), None, None, layout.rows, keys, device="cpu", BLOCK_SIZE=block)
    assert found.seq_lengths == (layout.rows, keys)
    # every needed block is there; those that hold nothing would cost time
    assert torch.equal(found.to_dense(), want.to_dense())


def test_flex_attention_over_keys_laid_out_ahead_computes_candidate_attention():
    inputs = Inputs.random(7, 3, 5, 2, 16, torch.float32)
    layout = flex_layout(7, 3, 5)

    def dense(query, key, value, *, block_mask, kernel_options):
        row, column = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
        mask = block_mask.mask_mod(None, None, row, column)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    check(flex_prepare(dense, flex_block_mask(layout, CPU), layout, inputs)(), inputs, 1e-5)


@pytest.mark.parametrize("name", list(BATCH_RIVALS))
@pytest.mark.parametrize("k", [1, 3])
def test_a_training_rival_has_the_reference_s_results_and_gradients(name, k):
    step = random_step(Shape(5, k, 4, 16, h=2, batch=3), torch.float64, "cpu")
    want = ours_batch(*step.tensors, backend="reference")
    torch.testing.assert_close(BATCH_RIVALS[name](*step.tensors), want, rtol=1e-9, atol=1e-9)
    found = gradients(BATCH_RIVALS[name], step)
    # in chunks, whose shared gradients add up
    assert relative_error(found, reference_gradients(step, chunk=2)) < 1e-9


@pytest.mark.parametrize("name", list(LAYER_OPERATORS))
def test_plain_pytorch_computes_the_layer_s_operator(name):
    operator = LAYER_OPERATORS[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (*operator.shapes(13, 32), (32,), (32,))]
    torch.testing.assert_close(operator.ours(*tensors, backend="reference"), operator.plain(*tensors))


def test_peak_bytes_counts_what_is_held_at_once():
    def call() -> torch.Tensor:
        first = torch.ones(1000)
        del first
        return torch.ones(2000) + torch.ones(2000)

    # two inputs and the sum
    assert 3 * 8000 <= peak_bytes(call) <= 3 * 8000 + 4000
