"""The layer kernels' launch rules. That they compile, fit and spill nothing is tested in test_resources.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from mixkernels.layer import triton_layer_norm as layer_norm
from mixkernels.layer import triton_scoring as scoring
from mixkernels.layer.triton_rows import SHIPPED_WIDTHS, TRITON_TYPES, row_layout, runs, tile_config


@pytest.mark.parametrize("elements", [2048, 4096])
def test_every_tile_covers_a_row_and_no_more_elements_than_registers_hold(elements):
    for width in range(1, 4097):
        config = tile_config(width, elements)
        assert config.block_d >= width
        assert config.block_d & (config.block_d - 1) == 0
        assert 1 <= config.block_r <= 32
        assert config.block_r * config.block_d <= max(elements, config.block_d)
        # of scoring, whose runs are whole tiles
        assert scoring.run_length(1) % config.block_r == 0


@given(rows=st.integers(0, 10**7), block_r=st.sampled_from([1, 2, 4, 32]))
def test_summing_programs_are_few_and_together_take_every_row(rows, block_r):
    programs, tiles_each = runs(rows, block_r)
    assert programs <= 1024
    assert programs * tiles_each * block_r >= rows
    assert max(0, programs - 1) * tiles_each * block_r <= rows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), shape=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_row_layouts_address_every_row_of_every_tensor(data, shape):
    tensors = []
    for start in (0, 1000):
        order = data.draw(st.permutations(range(len(shape))))
        tensor = (start + torch.arange(math.prod(shape) * 2)).view([*(shape[i] for i in order), 2])
        back = [order.index(i) for i in range(len(shape))]
        tensors.append(tensor.permute(*back, len(shape)))
    tensors.append(tensors[0][..., :1, :].expand(tensors[0].shape) if len(shape) > 1 else tensors[0])
    layout = row_layout(*tensors)
    for tensor, read, strides in zip(tensors, layout.tensors, layout.strides, strict=True):
        rows = read.as_strided((*layout.sizes, 2), (*strides, 1)).reshape(-1, 2)
        assert torch.equal(rows, tensor.reshape(-1, 2))
        assert layout.rows == len(rows)


def test_stacked_rows_and_pools_are_not_copied():
    stacked, pool = torch.zeros(5, 7, 4, 16), torch.zeros(7, 3, 16)
    views = [stacked[:, :, :3], pool.expand(5, 7, 3, 16)]
    layout = row_layout(*views)
    assert [tensor.data_ptr() for tensor in layout.tensors] == [view.data_ptr() for view in views]
    assert layout.sizes == (5, 7, 3)


def test_launches_tell_a_profiler_their_work():
    kernel, rows = SimpleNamespace(name="k"), torch.zeros(1, dtype=torch.bfloat16)
    describe = layer_norm._metadata(8, ("x_ptr", "residual_ptr", "out_ptr"))
    work = describe((1,), kernel, {"rows": 10, "D": 768, "x_ptr": rows, "residual_ptr": rows, "out_ptr": rows})
    assert work == {"name": "k [rows=10 d=768]", "flops32": 8 * 7680, "bytes": 3 * 2 * 7680}
    describe = layer_norm._metadata(1, ("gate_ptr", "state_ptr"))
    work = describe((1,), kernel, {"rows": 1, "D": 8, "gate_ptr": rows, "state_ptr": rows, "HAS_STATE": False})
    assert work["bytes"] == 16
    describe = scoring._metadata(7, 6, 2, 2)
    work = describe((1,), kernel, {"batch": 2, "num_candidates": 5, "D": 8, "K": 3, "context_ptr": rows})
    assert work == {"name": "k [candidates=2x5 k=3 d=8]", "flops32": 80 * (4 * 7 + 6), "bytes": 80 * 2 * (3 * 2 + 2)}


def test_every_variant_describes_all_arguments_of_its_kernel():
    variants = layer_norm.variants() + scoring.variants()
    for variant in variants:
        names = set(variant.kernel.arg_names)
        assert names == set(variant.signature) | set(variant.constants), variant.config
        assert not set(variant.signature) & set(variant.constants)
        assert {"weight_ptr"} < set(variant.divisible) <= set(variant.signature)
        assert not {"rows", "num_candidates", "eps", "n1", "a_n", "g_n"} & set(variant.divisible)
        assert {"x_0", "c_n", "u_2"} & set(variant.divisible)
    labels = [(variant.kernel.__name__, variant.config) for variant in variants]
    assert len(set(labels)) == len(labels) == 10 * len(SHIPPED_WIDTHS) * len(TRITON_TYPES)
