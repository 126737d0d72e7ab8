"""The benchmarks of ranking: what they compare with, and the ratios that they report."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import ranking as gpu_ranking
from benchmarks.index.speed import (
    CROSS,
    CROSS_PAIRS,
    NARROW,
    NARROW_ON_DISK,
    ON_DISK,
    bare_products,
    plain_scores,
    ratios,
)
from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import MixEncoderModel
from mixkernels.devices import multiplies_natively
from tests.conftest import backbone_config


def make_model() -> MixEncoderModel:
    torch.manual_seed(0)
    return MixEncoderModel(MixEncoderConfig(backbone_config(initializer_range=0.3))).eval()


def test_bare_products_are_those_of_n_candidates_and_no_more():
    model, m = make_model(), 5
    d, wide = 32, 48
    for count in (3, 512, 700):
        with FlopCounterMode(display=False) as counter:
            bare_products(model, count, m)()
        # two rows a candidate: attention, W_o, FFN; one row: the gate
        a_candidate = 2 * (2 * m * d + d * d + 2 * d * wide) + d * d
        assert counter.get_total_flops() == 2 * count * a_candidate


def test_the_plain_model_is_the_model():
    model = make_model()
    ids = torch.randint(5, 27, (1, 9), generator=torch.Generator().manual_seed(1))
    context = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        state = model.encode_query(ids)
        want = model.interact(state, context.unsqueeze(1)).full[0]
    torch.testing.assert_close(plain_scores(model, state, context), want, rtol=1e-4, atol=1e-4)


def test_ratios_put_equal_work_side_by_side():
    seconds = {
        "tokenise and query pass": 1.0,
        "tokenise and query pass, default": 2.0,
        "products": 4.0,
        "plain eager": 20.0,
        "dual-encoder": 0.5,
        CROSS: 3.0 * CROSS_PAIRS,
        "rank projected float32": 5.0,
        "rank projected float32, default": 6.0,
        ON_DISK: 8.0,
        f"{ON_DISK}, default": 10.0,
    }
    assert ratios({"N": 100, "seconds": seconds}) == {
        # with the query pass that belongs to each
        "cross-encoder / rank projected float32": 50.0,
        "cross-encoder / rank projected float32, default": 300 / 8,
        f"cross-encoder / {ON_DISK}": 300 / 8,
        f"cross-encoder / {ON_DISK}, default": 30.0,
        "rank projected float32 / products": 1.25,
        f"{ON_DISK}, scoring / products": 7 / 4,
        "rank projected float32 / products and query pass": 6 / 5,
        f"{ON_DISK} / products and query pass": 8 / 5,
        "plain eager / rank projected float32": 20 / 6,
        f"plain eager / {ON_DISK}": 2.5,
        f"dual-encoder / {ON_DISK}": 0.5 / 8,
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_end_to_end_benchmark_of_a_gpu_runs(device, monkeypatch):
    monkeypatch.setattr(gpu_ranking, "RUNS", 1)
    shape, device = gpu_ranking.Shape(2, 32, 2), torch.device(device)
    large = gpu_ranking.rank_many(5000, device, shape)
    assert {name.split(",")[0] for name in large["seconds"]} == {"resident", "streamed"}
    small = gpu_ranking.beside_cross_encoder(12, device, shape)
    assert small["ratio"] == small["seconds"]["cross-encoder"] / small["seconds"]["mixencoder"]


def test_ratios_in_bfloat16_take_the_parts_in_bfloat16():
    seconds = {
        "tokenise and query pass": 1.0,
        "tokenise and query pass, default": 2.0,
        f"tokenise and query pass{NARROW}": 0.5,
        f"tokenise and query pass{NARROW}, default": 0.6,
        "products": 4.0,
        "products bfloat16": 2.0,
        "plain eager": 20.0,
        CROSS: 3.0 * CROSS_PAIRS,
        f"{CROSS}{NARROW}": 1.5 * CROSS_PAIRS,
        ON_DISK: 8.0,
        f"{ON_DISK} bfloat16 products": 5.0,
        NARROW_ON_DISK: 4.0,
        f"rank projected bfloat16{NARROW}, default": 2.4,
    }
    found = ratios({"N": 100, "seconds": seconds})
    assert found[f"cross-encoder / {NARROW_ON_DISK}"] == 300 / 4
    assert found[f"cross-encoder in bfloat16 / {NARROW_ON_DISK}"] == 150 / 4
    assert found[f"cross-encoder in bfloat16 / rank projected bfloat16{NARROW}, default"] == pytest.approx(50)
    assert f"cross-encoder in bfloat16 / {ON_DISK}" not in found
    assert found[f"{ON_DISK} bfloat16 products, scoring / products"] == 4 / 2
    assert found[f"{NARROW_ON_DISK}, scoring / products"] == 3.5 / 2
    assert found[f"{NARROW_ON_DISK} / products and query pass"] == 4 / 2.5


@pytest.mark.skipif(not multiplies_natively(torch.bfloat16), reason="this processor does not multiply bfloat16")
def test_bare_products_run_in_bfloat16():
    with torch.inference_mode():
        bare_products(make_model().bfloat16(), 700, 5)()
