"""How many programs of a kernel run at the same time, and how many share the tiles of a query."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

import itertools

from mixkernels import plans
from mixkernels.attention import triton_forward
from mixkernels.attention.triton_tiles import range_of_program
from mixkernels.triton_common import occupancy
from mixkernels.triton_common.occupancy import ARCHS, blocks_per_multiprocessor, one_wave, programs_each
from tests.kernels.attention_cases import Case, device_of

H200 = SimpleNamespace(
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=228 * 1024,
)
WAVE = 264
"""Of the forward kernel for short queries on an H200: two programs on each of 132 multiprocessors."""


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks", "limited_by"),
    [
        # as NVIDIA's occupancy calculator: 64 registers x 256 threads are a quarter of 65536
        ("sm_90", 64, 0, 8, 4, "registers"),
        ("sm_90", 255, 0, 8, 1, "registers"),
        # the forward kernel for short queries: k = 1, D = 64, 128 keys
        ("sm_90", 255, 114_688, 4, 2, "registers"),
        ("sm_90", 128, 114_688, 4, 2, "shared memory"),
        # 33 registers are given as 40
        ("sm_80", 33, 0, 4, 12, "registers"),
        ("sm_80", 16, 80 * 1024, 4, 2, "shared memory"),
        ("sm_90", 16, 80 * 1024, 4, 2, "shared memory"),
        ("sm_90", 16, 0, 1, 32, "warps and blocks"),
        ("sm_90", 16, 228 * 1024, 4, 0, "shared memory"),
        # 201 registers of 512 leave room for two wavefronts a SIMD
        ("gfx942", 201, 0, 4, 2, "registers"),
        ("gfx942", 32, 40 * 1024, 4, 1, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_vendors_rules(arch, registers, shared, warps, blocks, limited_by):
    assert blocks_per_multiprocessor(ARCHS[arch], registers, shared, warps) == (blocks, limited_by)


def test_tensor_memory_limits_blackwell():
    found = blocks_per_multiprocessor(ARCHS["sm_100"], 32, 1024, 4, tensor_memory=256)
    assert found == (2, "tensor memory")


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    monkeypatch.setattr(occupancy, "_WAVES", {})
    occupancy.limits_of.cache_clear()
    yield torch.device("cuda:0")
    occupancy.limits_of.cache_clear()


def test_a_wave_follows_from_the_compiled_kernel_and_the_device(h200):
    compilations = []

    class Kernel:
        def warmup(self, *arguments, grid, **options):
            compilations.append(options)
            return SimpleNamespace(
                n_regs=255, metadata=SimpleNamespace(shared=options["shared"]), _init_handles=lambda: None
            )

    kernel, arguments = Kernel(), (torch.zeros(1), 3)
    assert one_wave(kernel, arguments, {"num_warps": 4, "shared": 114_688}, h200) == WAVE
    assert one_wave(kernel, arguments, {"num_warps": 4, "shared": 114_688}, h200) == WAVE
    assert len(compilations) == 1
    assert one_wave(kernel, arguments, {"num_warps": 4, "shared": 150_000}, h200) == 132
    assert one_wave(kernel, (torch.zeros(1).half(), 3), {"num_warps": 8, "shared": 0}, h200) == 132
    assert len(compilations) == 3


def test_an_h200_has_the_limits_of_its_architecture(h200):
    multiprocessors, limits = occupancy.limits_of(h200)
    assert multiprocessors == 132
    # PyTorch does not tell the number of blocks; with four warps and more it is no limit
    assert limits._replace(blocks=32, target=90) == ARCHS["sm_90"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tiles=st.integers(1, 10**6), programs=st.integers(1, 700))
def test_ranges_cover_every_tile_once_and_differ_by_one_tile_at_most(tiles, programs):
    ranges = [range_of_program.fn(number, programs, tiles) for number in range(programs)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == tiles
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert {last - first for first, last in ranges} <= {tiles // programs, -(-tiles // programs)}


def efficiency(pairs: int, tiles: int, wave: int) -> float:
    """Tiles of a launch, as a fraction of what its waves could compute in their time."""
    programs = programs_each(pairs, tiles, wave)
    assert 1 <= programs <= tiles
    waves = -(-pairs * programs // wave)
    return pairs * tiles / (waves * wave * -(-tiles // programs))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 8, 16, 23, 45, 64, 300])
def test_the_last_wave_is_as_full_as_the_others(batch):
    # a wanted number of four programs a multiprocessor gave 2.05 to 2.23 waves at 3, 5, 7, 8, 16, 23 and 45
    assert efficiency(12 * batch, 1563, WAVE) > 0.97
    assert efficiency(12 * batch, 157, WAVE) > 0.89


def test_programs_that_fit_at_once_are_one_wave():
    assert programs_each(12, 1563, WAVE) == 22
    # not more than there are tiles, and one at least
    assert programs_each(12, 3, WAVE) == 3
    assert programs_each(10**6, 3, WAVE) == 1


@pytest.mark.parametrize("batch", [3, 23])
def test_a_launch_has_as_many_programs_as_that(monkeypatch, batch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(triton_forward, "candidate_attention_fwd_short_kernel", Recorded())
    monkeypatch.setattr(triton_forward, "INTERPRET", False)
    monkeypatch.setattr(triton_forward, "one_wave", lambda *arguments: WAVE)
    Case.random(n=64 * 20, k=1, m=7, b=batch, h=4, dtype=torch.bfloat16).run("triton")
    assert grids == [(4 * batch * programs_each(4 * batch, 20, WAVE),)]


@pytest.mark.skipif(device_of("triton") == "cuda", reason="a GPU's own wave cannot be chosen")
@pytest.mark.parametrize("form", ["pool", "per query", "gathered"])
def test_the_number_of_programs_changes_no_bit(monkeypatch, form, pytestconfig):
    # five tiles of a query and head, the last one not full
    case = Case.random(n=300, k=1, m=7, b=2, h=2, form=form, lengths=[7, 3], dtype=torch.bfloat16)
    results = []
    for wave in (1, 8, 12, 1000):
        monkeypatch.setattr(triton_forward, "_INTERPRETED_WAVE", wave)
        plans.clear()
        results.append(case.run("triton", pytestconfig))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)
