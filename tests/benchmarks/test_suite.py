"""The benchmark suite's machinery on made-up cases, and its cases at tiny sizes; what they find is no claim."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from benchmarks.gpu.attention import Shape
from benchmarks.measuring import models, peaks
from benchmarks.measuring.costs import Encoder, encoder_cost, interaction_cost, projection_cost, query_cost
from benchmarks.measuring.machine import machine_facts
from benchmarks.suite import end_to_end, index, layers, operators
from benchmarks.suite.case import RECORD_KEYS, Budget, Case, Contender, Prepared, run_case
from benchmarks.suite.results import refused, split
from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import MixEncoderModel
from mixkernels.roofline import Cost, Peaks

ROOT = Path(__file__).parents[2]
ALL = (*operators.CASES, *layers.CASES, *end_to_end.CASES, *index.CASES)
ONCE = Budget(seconds=0.0, least=1, most=1)
SECTION_7 = {"shape", "dtype", "device", "backend", "bytes", "flops", "fraction_of_limit", "peak_bytes"}
SECTION_7 |= {"rival", "ratio"}


@pytest.fixture(autouse=True)
def fixed_peaks(monkeypatch):
    """Peaks that no machine has: nothing here depends on the rates of this one or on other work on it."""
    monkeypatch.setattr(peaks, "_best", {})
    monkeypatch.setattr(peaks, "_measure", lambda products: Peaks(1e18, 1e18, 1e18))


def made_up(**changes):
    """Three contenders, whose result is their name."""
    contenders = {name: Contender(lambda name=name: name) for name in ("ours", "first", "second")}
    contenders |= changes.pop("contenders", {})

    def check(name, result):
        assert result == name

    def prepare(names):
        return Prepared({name: contenders[name] for name in names}, check, Cost(10, 20, 0))

    case = Case("operators", "nothing", {"N": 3}, torch.float32, ("ours",), ("first", "second"), prepare)
    return replace(case, **changes)


@pytest.fixture
def took(monkeypatch):
    """Tell what calls took instead of timing them."""
    seconds = {"ours": [2.0, 1.0, 3.0], "first": [8.0, 8.0], "second": [4.0]}
    monkeypatch.setattr(
        "benchmarks.suite.case.interleaved_samples", lambda calls, **budget: {name: seconds[name] for name in calls}
    )
    return seconds


def test_a_record_is_a_claim_with_its_rival_and_its_limit(took):
    records = run_case(made_up()).records
    assert all(tuple(record) == RECORD_KEYS for record in records.values())
    assert set(RECORD_KEYS) >= SECTION_7
    ours = records["ours"]
    assert (ours["seconds"], ours["rival"], ours["ratio"]) == (2.0, "second", 2.0)
    assert ours["ratios"] == {"first": 4.0, "second": 2.0}
    assert ours["own"]
    assert not records["first"]["own"]
    assert records["first"]["ratio"] == 0.5
    assert ours["commit"]
    assert "torch" in ours["versions"]


def test_a_case_may_name_its_rival(took):
    assert run_case(made_up(rival="first")).records["ours"]["rival"] == "first"
    # unless it does not run
    absent = made_up(rival="first", unavailable=lambda name: "not here" if name == "first" else None)
    assert run_case(absent).records["ours"]["rival"] == "second"


def test_a_call_that_does_a_part_counts_for_the_whole(took):
    part = Contender(lambda: "first", Cost(1, 2, 3), factor=10.0, facts={"scaled": "timed on a tenth"})
    outcome = run_case(made_up(contenders={"first": part}))
    assert outcome.samples["first"] == [80.0, 80.0]
    assert outcome.records["first"]["facts"] == {"scaled": "timed on a tenth"}
    assert outcome.records["ours"]["ratios"]["first"] == 40.0
    assert [outcome.records[name]["flops"] for name in ("ours", "first")] == [10, 1]


def test_a_wrong_result_has_no_speed(took):
    with pytest.raises(AssertionError):
        run_case(made_up(contenders={"second": Contender(lambda: "something else")}))


# -- what is timed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_models(monkeypatch):
    """Models of a tiny shape in the place of MiniLM's, made anew."""
    tiny = Encoder(layers=3, d=32, heads=2, inner=64)
    for module in (models, layers, end_to_end, index):
        monkeypatch.setattr(module, "MINILM", tiny)
    made = [models.engine, models._backbone, models.sentence_transformers_cross_encoder]
    made += [end_to_end.query_text, end_to_end.documents, end_to_end.embedded]
    made += [index.scratch, index._row_bytes, index._files]

    def forget():
        for function in made:
            function.cache_clear()

    forget()
    yield
    forget()


def test_names_are_unique_and_rivals_are_there():
    names = [case.name for case in ALL]
    assert len(names) == len(set(names))
    for case in ALL:
        assert case.own
        assert case.rivals
        assert case.rival is None or case.rival in case.rivals
        assert set(case.quick) <= set(case.rivals)
        assert not (case.quick and case.long)


def assert_right(case):
    """Run a case, which checks every result, and look at its records."""
    records = run_case(case, ONCE).records
    assert list(records) == [name for name in case.contenders if case.unavailable(name) is None]
    for record in records.values():
        assert record["seconds"] > 0
        assert record["fraction_of_limit"] > 0
    return records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_meets_rivals_that_compute_the_same(dtype):
    assert_right(operators.attention_case(Shape(7, 2, 5, 16, h=2), dtype))


@pytest.mark.parametrize("forward_too", [False, True])
def test_gradients_meet_rivals_that_compute_the_same(forward_too, monkeypatch):
    monkeypatch.setattr(operators, "LAYER_ROWS", 12)
    assert_right(operators.training_case(Shape(6, 1, 5, 16, h=2, batch=3), forward_too=forward_too))
    for operator in ("residual_layer_norm", "gate_layer_norm", "score_candidates"):
        assert_right(operators.layer_training_case(operator, forward_too=forward_too))


def test_a_layer_meets_the_same_layer_over_standard_attention(tiny_models, monkeypatch):
    monkeypatch.setattr(layers, "CANDIDATES", 40)
    monkeypatch.setattr(layers, "BATCH", 2)
    monkeypatch.setattr(layers, "POOL", 3)
    records = assert_right(layers.forward_case(8))
    # what is stored is not computed
    assert records["fused"]["flops"] < records["torch"]["flops"]
    assert_right(layers.training_case())


def test_a_wrong_layer_is_found(tiny_models, monkeypatch):
    monkeypatch.setattr(layers, "CANDIDATES", 40)
    monkeypatch.setitem(layers.RIVALS, "two-pass", lambda inputs: (inputs.context_query, inputs.state_query))
    with pytest.raises(AssertionError, match="two-pass is off by"):
        run_case(layers.forward_case(8), ONCE)


def test_all_architectures_rank_the_same_candidates(tiny_models):
    records = assert_right(end_to_end.rank_case(20))
    assert records["mixencoder"]["rival"] == "cross-encoder"
    assert records["cross-encoder"]["facts"]["scaled"] == "timed on 16 pairs"
    # a vector for every token, and half the numbers that the first layer wants
    assert records["late-interaction"]["facts"]["stored_bytes"] == 128 * 128 * 4
    assert "scaled" not in assert_right(end_to_end.rank_case(10))["cross-encoder"]["facts"]


def test_the_index_does_what_its_rival_does(tiny_models, monkeypatch):
    monkeypatch.setattr(index, "CANDIDATES", 300)
    for case in index.CASES:
        assert_right(case)


# -- what it costs -----------------------------------------------------------------------------------------------------


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_an_encoder_costs_what_its_products_cost():
    encoder = Encoder(layers=3, d=32, heads=2, inner=48)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=50, attn_implementation="eager", **sizes)
    bert = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(50, (4, 7))
    assert encoder_cost(encoder, 4, 7, torch.float32).flops == flops_of(lambda: bert(tokens))
    weights = sum(module.weight.numel() for module in bert.encoder.modules() if isinstance(module, nn.Linear))
    assert encoder_cost(encoder, 4, 7, torch.float32).bytes == 4 * (weights + 4 * 7 * 32)
    # the last layer's keys and values alone
    one_layer = encoder_cost(encoder, 1, 7, torch.float32, layers=2).flops
    assert query_cost(encoder, 7, torch.float32).flops == one_layer + 4 * 7 * 32**2


def test_an_interaction_layer_costs_what_its_products_cost():
    # at k = 1 PyTorch makes no product of own keys, which a counter of products would miss
    encoder, k = Encoder(layers=1, d=32, heads=2, inner=48), 3
    backbone = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    model = MixEncoderModel(MixEncoderConfig(backbone, num_context_embeddings=k)).eval()
    key, value = torch.randn(2, 5, 2, 16)
    attend = layers._attend_one(layers.RIVALS["einsum-concatenated"], key, value)
    rest = interaction_cost(encoder, 6, k, 5, torch.float32, stored_bytes=0)
    cost = projection_cost(encoder, 6, k, torch.float32).and_then(rest)
    # the score is a sum of products
    assert cost.flops == flops_of(lambda: model.run_interaction(torch.randn(6, k, 32), [attend])) + 6 * 2 * 32


def test_an_interaction_layer_costs_what_the_design_says():
    d, m = 32, 5
    encoder = Encoder(layers=1, d=d, heads=2, inner=4 * d)
    # docs/design.md, section 2: 38 d^2 at k = 1 where the first layer is stored, 4 (k + 1) m d of shared attention
    stored = interaction_cost(encoder, 6, 1, m, torch.float32, stored_bytes=0)
    assert stored.flops == 6 * (38 * d**2 + 8 * m * d + 2 * d + 2 * d)
    # 48 d^2 where nothing is: no state before the first layer, so that the gate has two parts of its three
    assert projection_cost(encoder, 6, 1, torch.float32).flops == 6 * (10 * d**2 + 2 * d)


# -- under pytest ------------------------------------------------------------------------------------------------------


BENCH = """
from functools import partial
import torch
from benchmarks.suite import case as contest
from benchmarks.measuring import peaks
from benchmarks.suite.case import Case, Contender, Prepared
from benchmarks.suite.pytest_cases import cases
from mixkernels.roofline import Cost, Peaks

# what this machine does has no part in it
peaks._measure = lambda products: Peaks(1e18, 1e18, 1e18)
contest.interleaved_samples = lambda calls, **budget: {name: call() for name, call in calls.items()}

def prepare(call, names):
    return Prepared({name: Contender(call) for name in names}, lambda name, result: None, Cost(1, 1, 0))

def case(operator, samples, **options):
    return Case("operators", operator, {"N": 1}, torch.float32, ("ours",), ("theirs", "absent"),
                partial(prepare, lambda: samples),
                unavailable=lambda name: "not installed" if name == "absent" else None, **options)

@cases([case("short", [1.0, 2.0, 1.5]), case("noisy", [1.0, 1.0, 9.0]), case("endless", [], long=True)])
def bench_made_up(runner, benchmark, case, contender):
    runner.run(benchmark, case, contender)
"""


def test_pytest_shows_and_writes_the_samples_that_a_case_was_judged_by(tmp_path):
    written = tmp_path / "found.json"
    (tmp_path / "bench_made_up.py").write_text(BENCH)
    ini = "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\nmarkers = long\n"
    (tmp_path / "pytest.ini").write_text(ini)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-rs", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", f"--benchmark-json={written}"]
    # a process of pytest-xdist times nothing, and what it starts takes itself for one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    shown = run.stdout
    assert run.returncode == 0, shown + run.stderr
    assert "operators: short N=1 float32" in shown
    assert "not installed" in shown
    assert "refused after 3 tries" in shown
    document = json.loads(written.read_text())
    assert [one["name"] for one in document["benchmarks"]] == ["ours", "theirs"]
    for one in document["benchmarks"]:
        assert one["stats"]["median"] == pytest.approx(one["extra_info"]["seconds"])
        assert one["stats"]["rounds"] == one["extra_info"]["samples"]
    found = split(document, "this test")
    assert list(found) == ["operators"]
    results = found["operators"]
    assert [tuple(record) for record in results.records] == [RECORD_KEYS] * 2
    assert {(entry["operator"], entry["backend"]) for entry in results.skipped} == {
        ("short", "absent"),
        *((operator, backend) for operator in ("noisy", "endless") for backend in ("ours", "theirs", "absent")),
    }
    # who stayed noisy is told, and has no figure
    told = [line.split(": ")[:2] for line in refused(results)]
    assert told == [["noisy N=1 float32", "ours"], ["noisy N=1 float32", "theirs"]]
    assert results.machine == machine_facts()
    assert {"float32", "bfloat16"} <= set(results.peaks)
    assert "node" not in document["machine_info"]


def test_the_limit_is_the_best_of_all_looks(monkeypatch):
    looks = iter([Peaks(2.0, 5.0, 1.0), Peaks(3.0, 4.0, 1.0)])
    monkeypatch.setattr(peaks, "_measure", lambda products: next(looks))
    assert peaks.best_peaks("float32") == peaks.best_peaks("float32") == (2.0, 5.0, 1.0)
    assert peaks.best_peaks("float32", remeasure=True) == (3.0, 5.0, 1.0)


def test_records_are_held_against_the_best_peaks_of_their_run(took):
    record = run_case(made_up()).records["ours"]
    document = {
        "machine_info": {"facts": {}, "peaks": {"float32": {"flops": 40.0, "bytes": 2.5, "exps": 1.0}}},
        "datetime": "now",
        "skipped": [],
        "benchmarks": [{"extra_info": record}],
    }
    # 10 FLOPs take a quarter of a second at best, 20 bytes eight: more than the two that were taken
    (found,) = split(document, "this test")["operators"].records
    assert (found["bound"], found["fraction_of_limit"]) == ("memory", 4.0)
