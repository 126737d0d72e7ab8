"""The benchmarks of ranking: what they compare with, and the ratios that they report."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import ranking as gpu_ranking
from benchmarks.index import limits
from benchmarks.index.contenders import CROSS, CROSS_PAIRS, DEFAULT, DUAL, NARROW, NARROW_ON_DISK, ON_DISK
from benchmarks.index.speed import (
    bare_products,
    middle_run,
    plain_scores,
    ratios,
)
from benchmarks.measuring.costs import MINILM, encoder_cost
from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import MixEncoderModel
from mixkernels.devices import Peaks, multiplies_natively
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


def test_limits_count_the_work_of_each_way_at_the_peaks_of_its_products(monkeypatch):
    # one second a FLOP; bfloat16 is twice, int8 four times as fast
    rates = {"float32": 1.0, "bfloat16": 2.0, "int8": 4.0}
    monkeypatch.setattr(limits, "best_peaks", lambda products, **options: Peaks(rates[products], 1e30, 1e30))
    count, prefix = 10_000, f"{ON_DISK}"
    names = [
        *(f"{prefix}{way}{DEFAULT}" for way in ("", " int8 products", " bfloat16 products", " prefilter")),
        *(f"{NARROW_ON_DISK}{way}{DEFAULT}" for way in ("", " prefilter")),
        *(DUAL, CROSS, f"{CROSS}{NARROW}"),
    ]
    record = {"N": count, "row_bytes": 3864, "token_size": 384, "seconds": dict.fromkeys(names, 1e30)}
    (found,) = limits.with_limits([record])
    least = found["limits"]
    assert set(least) == set(names)
    query = encoder_cost(MINILM, 1, 16, torch.float32).flops
    every = least[f"{prefix}{DEFAULT}"] - query
    # 38 d^2 a candidate and its attention
    assert every == pytest.approx(count * 38 * 384**2, rel=0.02)
    assert least[f"{prefix} int8 products{DEFAULT}"] - query == pytest.approx(every / 4)
    assert least[f"{prefix} bfloat16 products{DEFAULT}"] - query == pytest.approx(every / 2)
    assert least[f"{NARROW_ON_DISK}{DEFAULT}"] == pytest.approx((query + every) / 2)
    # 128 of 10,000 are scored fully, all with one product
    dual = count * 2 * 384
    assert least[f"{prefix} prefilter{DEFAULT}"] - query == pytest.approx(every * 128 / count + dual)
    assert least[DUAL] - query == pytest.approx(dual)
    assert least[CROSS] == 2 * least[f"{CROSS}{NARROW}"] == encoder_cost(MINILM, 32, 143, torch.float32).flops


def test_peaks_are_measured_again_if_a_time_is_below_its_limit(monkeypatch):
    rate = {"now": 1.0}

    def peaks(products, *, remeasure=False):
        if remeasure:
            rate["now"] = 1e9
        return Peaks(rate["now"], 1e30, 1e30)

    monkeypatch.setattr(limits, "best_peaks", peaks)
    (found,) = limits.with_limits([{"N": 10, "row_bytes": 1, "token_size": 1, "seconds": {DUAL: 5.0}}])
    assert found["limits"][DUAL] < 5.0


def test_the_middle_run_is_recorded_with_the_multiples_of_all():
    runs = [{"N": 32, "seconds": {CROSS: cross, f"{ON_DISK}{DEFAULT}": 1.0}} for cross in (7.0, 3.0, 5.0)]
    assert middle_run(runs) == runs[2] | {"multiples": [3.0, 5.0, 7.0]}
