"""The GPU benchmark's records are whole, its files atomic, its targets judged, its tuning table is source."""

import json

import pytest
import torch

from benchmarks.gpu import attention as gpu_groups
from benchmarks.gpu import tuning as gpu_tuning
from benchmarks.gpu.attention import LONGEST_EXPANSION, Bench, Shape, attention_workload, grid, measure, training
from benchmarks.gpu.attention import Group as MeasuredGroup
from benchmarks.gpu.formulations import eager_rivals
from benchmarks.gpu.layer import LAYER_OPERATORS, host, layer
from benchmarks.gpu.records import RECORD_KEYS, read_records, targets
from benchmarks.measuring.gpu_timing import Timing
from benchmarks.measuring.provenance import write_json
from mixkernels.attention import triton_launch as launch
from mixkernels.attention.triton_launch import Kind, LaunchConfig
from tests.benchmarks.gpu_cases import assert_whole, claim, make_bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return make_bench(tmp_path)


def test_attention_is_recorded_with_every_rival_its_limit_and_those_that_did_not_run(bench):
    group = MeasuredGroup("attention", bench)

    def wrong(inputs):
        return lambda: (inputs.context_query, inputs.state_query)

    def broken(inputs):
        raise RuntimeError("no kernel image\nlong trace")

    def full(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    rivals = eager_rivals() | {"wrong": wrong, "broken": broken, "full": full}
    measure(group, attention_workload(bench, Shape(20, 1, 5, 16, h=2), torch.float32, rivals))
    assert_whole(group.records)
    by_name = {record["backend"]: record for record in group.records}
    own = by_name["torch"]
    ran = {"sdpa-expanded", "einsum-concatenated", "two-pass", "two-pass-products", "sdpa-pre-expanded"}
    assert set(own["ratios"]) == ran
    assert own["ratio"] == min(own["ratios"].values()) == own["ratios"][own["rival"]]
    assert own["shape"] == {"B": 1, "N": 20, "k": 1, "m": 5, "H": 2, "D": 16}
    # contexts and states
    assert own["output_bytes"] == 2 * 20 * 2 * 16 * 4
    assert own["peak_bytes"] >= own["output_bytes"]
    assert 0 <= own["error"] < 1e-5
    reasons = {entry["backend"]: entry["reason"] for entry in group.skipped}
    assert reasons["wrong"].startswith("wrong: off by")
    assert reasons["broken"] == "RuntimeError: no kernel image"
    assert reasons["full"] == "out of memory"
    assert "two-pass-cudnn" in reasons
    document = json.loads((bench.folder / "gpu_attention.json").read_text())
    assert document["complete"] is False
    assert read_records(bench.folder) == group.records


def test_the_grid_leaves_out_what_takes_too_long_and_ends_in_time(bench, monkeypatch):
    records = grid(bench, [Shape(20, 1, 5, 16, h=2)])
    assert_whole(records)
    assert all(record["dtype"] == "bfloat16" for record in records)
    monkeypatch.setitem(LONGEST_EXPANSION, "grid", 0.0)
    assert "sdpa-expanded" not in {record["backend"] for record in grid(bench, [Shape(20, 1, 5, 16, h=2)])}
    bench.deadline = 0.0
    assert grid(bench, [Shape(20, 1, 5, 16, h=2)]) == []
    document = json.loads((bench.folder / "gpu_grid.json").read_text())
    assert document["complete"] is True
    assert [entry["reason"] for entry in document["skipped"]] == ["the run's time was over"]


def test_a_training_step_is_recorded(bench):
    shapes = [Shape(4, 1, 5, 16, h=2, batch=3)], [Shape(6, 1, 5, 16, h=2)]
    records = training(bench, *shapes, torch.float32, compile_too=False)
    assert_whole(records)
    operators = [record["operator"] for record in records if record["backend"] == "torch"]
    assert operators == ["candidate_attention backward", "candidate_attention training step"]
    assert {"sdpa-expanded", "einsum-concatenated", "two-pass-flash"} == set(records[0]["ratios"])


def test_the_layer_is_recorded(bench):
    records = layer(bench, [(16, 32)], torch.float32, compile_too=False)
    assert_whole(records)
    assert {record["operator"] for record in records} == set(LAYER_OPERATORS)
    assert {record["backend"] for record in records} == {"torch", "pytorch"}


def test_the_host_is_recorded(bench, monkeypatch):
    monkeypatch.setenv("MIXKERNELS_BACKEND", "torch")
    records = host(bench, Shape(12, 1, 3, 16, h=2), torch.float32, calls=2)
    assert {record["operator"] for record in records} >= {"host: candidate_attention", "host: score_candidates"}
    assert all(set(record) == set(RECORD_KEYS) and record["host_seconds"] > 0 for record in records)


def test_a_noisy_contender_is_timed_again_and_then_refused_with_the_reason(bench, monkeypatch):
    bench.largest_spread, turns = 0.25, []
    own, rival = Timing(1.0, 0.0, 1.0, 5), Timing(1.0, 0.9, 1.0, 5)

    def timings(calls, device, *, seconds):
        turns.append(1)
        return {name: found[name] for name in calls}, {}

    monkeypatch.setattr(gpu_groups, "interleaved_timings", timings)
    group = MeasuredGroup("attention", bench)
    rivals = {name: eager_rivals()[name] for name in ("einsum-concatenated", "two-pass")}
    work = attention_workload(bench, Shape(20, 1, 5, 16, h=2), torch.float32, rivals)
    found = {"torch": own, "einsum-concatenated": rival, "two-pass": own}
    measure(group, work)
    assert len(turns) == 3
    assert [record["backend"] for record in group.records] == ["torch", "two-pass"]
    assert group.records[0]["ratios"] == {"two-pass": 1.0}
    (entry,) = group.skipped
    assert entry["backend"] == "einsum-concatenated"
    assert "a spread of 0.90, expected 0.25 at most" in entry["reason"]
    # faster than its limit is no time either, and a group without ours has no records
    found["torch"] = own._replace(seconds=1e-30)
    measure(group, work)
    assert len(group.records) == 2
    assert "of the limit, expected 1 at most" in group.skipped[1]["reason"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "gpu_x.json"
    write_json(path, {"records": [{"a": 1}, {"a": 2}], "empty": [], "name": "x"})
    before = path.read_text()
    assert json.loads(before) == {"records": [{"a": 1}, {"a": 2}], "empty": [], "name": "x"}
    assert len(before.splitlines()) == 8
    with pytest.raises(TypeError):
        write_json(path, {"records": [{"a": object()}]})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


BOUNDS = [
    # the worst record counts, at any rival
    ([claim(), claim(m=16, memory_fraction=0.79)], "of memory peak, D=64, m<=128, N>=1e5", "MISSED"),
    ([claim()], "times the best compiled rival, D=64", "reached"),
    (
        [claim(), claim(ratios={"flashinfer-cascade": 1.1, "two-pass": 9})],
        "times the best compiled rival, D=64",
        "MISSED",
    ),
    ([claim()], "times the best eager two-pass, D=64", "reached"),
    ([claim()], "times SDPA expanded, D=64", "reached"),
    ([claim(m=512, tflops=339.0)], "forward at m=512, D=64", "MISSED"),
    ([claim(m=512, tflops=340.0)], "forward at m=512, D=64", "reached"),
    ([claim(m=512, tflops=401.0)], "forward at m=512, D=64", "reached, stretch too"),
    # these are bounds from above
    ([claim()], "forward workspace", "reached"),
    ([claim(peak_bytes=10 * 2**20)], "forward workspace", "MISSED"),
    ([claim("host: candidate_attention")], "host cost of one operator call", "reached"),
    ([claim("host: replayed graph", host_seconds=6e-6)], "host cost of a replayed graph", "MISSED"),
]


@pytest.mark.parametrize(("records", "target", "verdict"), BOUNDS)
def test_a_target_is_judged_by_its_bound(records, target, verdict):
    assert {found.claim: found.verdict for found in targets(records)}[target] == verdict


def test_small_calls_other_precisions_and_other_k_are_outside_the_targets():
    others = [claim(n=1000), claim(dtype="float32"), claim(backend="two-pass")]
    others.append(claim() | {"shape": {"k": 3, "N": 10**6}})
    assert {target.verdict for target in targets(others)} == {"not measured"}


KIND = Kind("forward_streamed", 1, 2, 64, 2)


def test_configurations_are_timed_against_the_rule_and_the_best_become_entries(bench, monkeypatch):
    monkeypatch.setattr(gpu_tuning, "candidates", lambda kind: launch.alternatives(kind)[:3])
    trial = gpu_tuning.Trial(Kind("backward_shared", 1, 2, 16, 2), (Shape(6, 1, 5, 16, h=2), Shape(4, 1, 5, 16, h=2)))
    tried = gpu_tuning.timed(bench, trial)
    assert [entry["failure"] for entry in tried] == [None] * 3
    assert tried[0]["of_rule"] == 1.0
    assert all(len(entry["seconds"]) == 2 and entry["of_rule"] > 0 for entry in tried)
    json.dumps(tried)
    # one that did not run at every shape has no mean
    entry = {"kind": KIND._asdict(), "config": LaunchConfig(128, 64, 8, 3)._asdict(), "of_rule": 0.9}
    assert gpu_tuning.best([entry | {"of_rule": 1.0}, entry | {"of_rule": None}, entry]) is entry
    lines = gpu_tuning.table_lines("a GPU", [entry, entry | {"of_rule": 0.99}])
    assert [json.loads(line) for line in lines] == [{"kind": entry["kind"], "config": entry["config"]}]
