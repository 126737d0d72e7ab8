"""The GPU benchmark without a GPU: its rivals are right, its records whole, its targets judged, its files atomic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_oracle import attention_by_loops

from benchmarks import gpu, gpu_tuning
from benchmarks.formulations import Inputs
from benchmarks.gpu_formulations import (
    BATCH_RIVALS,
    Batch,
    UnavailableError,
    compiled_rivals,
    eager_rivals,
    flashinfer_unavailable,
    flex_block_mask,
    flex_layout,
    flex_mask,
    flex_prepare,
    fused_attention,
    ours_batch,
    two_pass,
)
from benchmarks.gpu_groups import (
    BF16,
    GRID,
    KEY_SHAPES,
    LONGEST_EXPANSION,
    Bench,
    Shape,
    attention_workload,
    gradients,
    grid,
    measure,
    random_step,
    reference_gradients,
    relative_error,
    training,
)
from benchmarks.gpu_groups import Group as MeasuredGroup
from benchmarks.gpu_layer import LAYER_OPERATORS, host, layer
from benchmarks.gpu_records import (
    RECORD_KEYS,
    Machine,
    read_records,
    slug,
    target_table,
    targets,
    write_json,
)
from benchmarks.gpu_timing import interleaved_timings
from mixkernels.roofline import Peaks
from mixkernels.triton_backend import launch
from mixkernels.triton_backend.launch import Kind, LaunchConfig, launch_config

CPU = torch.device("cpu")
PEAKS = Peaks(1e12, 1e11, 1e11)


@pytest.fixture
def bench(tmp_path) -> Bench:
    machine = Machine(CPU, "a test", lambda dtype: (PEAKS, "made up"), PEAKS, {"torch": "0"}, "abc", {"command": "x"})
    return Bench(machine, "torch", tmp_path, seconds=0.0)


def oracle(inputs: Inputs):
    found = attention_by_loops(
        inputs.context_query,
        inputs.context_key,
        inputs.context_value,
        inputs.state_query,
        inputs.key.unsqueeze(0),
        inputs.value.unsqueeze(0),
    )
    return found[0][0], found[1][0]


# -- the rivals are right ----------------------------------------------------------------------------------------------


def check(result, inputs):
    for got, want in zip(result, oracle(inputs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [name for name in eager_rivals() if name != "two-pass-cudnn"])
def test_an_eager_rival_computes_candidate_attention(name, k):
    inputs = Inputs.random(7, k, 5, 2, 16, torch.float32)
    check(eager_rivals()[name](inputs)(), inputs)


@pytest.mark.parametrize("name", ["two-pass", "sdpa-expanded", "sdpa-pre-expanded"])
def test_chunks_join(name, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_formulations.GRID_LIMIT", 3)
    inputs = Inputs.random(7, 3, 5, 2, 16, torch.float32)
    check(eager_rivals()[name](inputs)(), inputs)


@pytest.mark.parametrize("fused_own", [True, False])
def test_two_passes_take_any_fused_attention(fused_own):
    calls = []

    def attend(*tensors):
        calls.append(tensors[0].shape)
        return fused_attention(*tensors)

    inputs = Inputs.random(4, 2, 5, 2, 16, torch.float32)
    check(two_pass(inputs, attend=attend, fused_own=fused_own), inputs)
    # shared keys of contexts and of states, then own keys
    assert len(calls) == 2 + fused_own


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

    check(flex_prepare(dense, flex_block_mask(layout, CPU), layout, inputs)(), inputs)


def test_rivals_that_cannot_run_say_why():
    inputs = Inputs.random(7, 1, 5, 2, 16, torch.float32)
    with pytest.raises(UnavailableError, match="GB"):
        eager_rivals(most_expanded_bytes=10)["sdpa-pre-expanded"](inputs)
    if reason := flashinfer_unavailable():
        with pytest.raises(UnavailableError, match=reason):
            compiled_rivals()["flashinfer-cascade"](inputs)


@pytest.mark.parametrize("name", list(BATCH_RIVALS))
@pytest.mark.parametrize("k", [1, 3])
def test_a_training_rival_has_the_reference_s_results_and_gradients(name, k):
    step = random_step(Shape(5, k, 4, 16, h=2, batch=3), torch.float64, "cpu")
    want = ours_batch(*step.tensors, backend="reference")
    torch.testing.assert_close(BATCH_RIVALS[name](*step.tensors), want, rtol=1e-9, atol=1e-9)
    found = gradients(BATCH_RIVALS[name], step)
    # in chunks, whose shared gradients add up
    assert relative_error(found, reference_gradients(step, chunk=2)) < 1e-9


def test_a_batch_is_random_and_differentiable():
    batch = Batch.random(2, 3, 1, 4, 2, 16, BF16, "cpu")
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in batch.tensors())
    assert batch.key.shape == (2, 4, 2, 16)


@pytest.mark.parametrize("name", list(LAYER_OPERATORS))
def test_plain_pytorch_computes_the_layer_s_operator(name):
    operator = LAYER_OPERATORS[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (*operator.shapes(13, 32), (32,), (32,))]
    torch.testing.assert_close(operator.ours(*tensors, backend="reference"), operator.plain(*tensors))


# -- records -----------------------------------------------------------------------------------------------------------


def assert_whole(records):
    for record in records:
        assert set(record) == set(RECORD_KEYS)
        assert record["seconds"] > 0
        assert record["samples"] >= 5
        assert record["commit"] == "abc"
        assert record["provenance"]["peaks"] == "made up"
    json.dumps(records)


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
    assert set(own["ratios"]) == {
        "sdpa-expanded",
        "einsum-concatenated",
        "two-pass",
        "two-pass-products",
        "sdpa-pre-expanded",
    }
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
    records = training(
        bench, [Shape(4, 1, 5, 16, h=2, batch=3)], [Shape(6, 1, 5, 16, h=2)], torch.float32, compile_too=False
    )
    assert_whole(records)
    operators = [record["operator"] for record in records if record["backend"] == "torch"]
    assert operators == ["candidate_attention backward", "candidate_attention training step"]
    assert {"sdpa-expanded", "einsum-concatenated"} == set(records[0]["ratios"])


def test_expanded_pairs_beyond_the_grid_are_skipped_with_the_reason(bench, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_groups.GRID_LIMIT", 11)
    training(bench, [Shape(4, 1, 5, 16, h=2, batch=3)], [], torch.float32, compile_too=False)
    (skipped,) = json.loads((bench.folder / "gpu_training.json").read_text())["skipped"]
    assert skipped["backend"] == "sdpa-expanded"
    assert skipped["reason"].startswith("more than 11 pairs")


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


def test_contenders_take_turns_on_inputs_that_rotate():
    order = []
    contenders = {name: [lambda name=name, i=i: order.append((name, i)) for i in range(3)] for name in "ab"}
    timings, failures = interleaved_timings(contenders, CPU, seconds=0.0, least=5)
    assert set(timings) == {"a", "b"}
    assert failures == {}
    assert timings["a"].samples == 5
    # three runs to warm up each, then in every turn one untimed and one timed, each on the next set
    assert order[6:14] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 0), ("b", 2), ("b", 0)]


def test_a_contender_that_fails_late_stops_no_other():
    calls = []

    def fails_late():
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("late")

    timings, failures = interleaved_timings({"bad": [fails_late], "good": [lambda: None]}, CPU, seconds=0.0)
    assert failures == {"bad": "RuntimeError: late"}
    assert list(timings) == ["good"]


def test_section_7_s_shapes_are_all_there():
    assert len(GRID) == len(set(GRID)) == 4 * 2 * 3 * 4
    assert {shape.m for shape, _ in KEY_SHAPES} == {16, 64, 128, 512}
    assert len(set(KEY_SHAPES)) == len(KEY_SHAPES)


# -- files -------------------------------------------------------------------------------------------------------------


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


def test_a_folder_is_named_after_the_device():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# -- targets -----------------------------------------------------------------------------------------------------------


def claim(operator="candidate_attention", n=100_000, m=64, d=64, **changes):
    record = dict.fromkeys(RECORD_KEYS)
    shape = {"B": 1, "N": n, "k": 1, "m": m, "H": 12, "D": d}
    record |= {"operator": operator, "backend": "triton", "dtype": "bfloat16", "shape": shape}
    record |= {"memory_fraction": 0.85, "tflops": 100.0, "peak_bytes": 10, "output_bytes": 10, "host_seconds": 20e-6}
    record["ratios"] = {"two-pass": 5.0, "two-pass-cudnn": 3.5, "flex-compiled": 1.5, "sdpa-expanded": 30.0}
    return record | changes


def verdicts(records):
    return {target.claim: target.verdict for target in targets(records)}


def test_targets_without_records_are_not_measured():
    assert set(verdicts([]).values()) == {"not measured"}


def test_targets_are_judged_by_the_worst_record():
    found = verdicts([claim(), claim(m=16, memory_fraction=0.79)])
    assert found["of memory peak, D=64, m<=128, N>=1e5"] == "MISSED"
    assert found["times the best compiled rival, D=64"] == "reached"
    assert found["times the best eager two-pass, D=64"] == "reached"
    assert found["times SDPA expanded, D=64"] == "reached"
    assert found["forward workspace"] == "reached"
    assert found["of memory peak, D=32, m=128, N>=1e5"] == "not measured"
    # a rival that is close in one record counts
    worse = claim(ratios={"two-pass-compiled": 1.2, "flashinfer-cascade": 1.1, "two-pass": 9.0})
    assert verdicts([claim(), worse])["times the best compiled rival, D=64"] == "MISSED"


def test_small_calls_other_precisions_and_other_k_are_outside_the_targets():
    others = [
        claim(n=1000),
        claim(dtype="float32"),
        claim(backend="two-pass"),
        claim() | {"shape": {"k": 3, "N": 10**6}},
    ]
    assert set(verdicts(others).values()) == {"not measured"}


@pytest.mark.parametrize(
    ("tflops", "verdict"), [(339.0, "MISSED"), (340.0, "reached"), (401.0, "reached, stretch too")]
)
def test_a_stretch_is_told_from_the_target(tflops, verdict):
    assert verdicts([claim(m=512, tflops=tflops)])["forward at m=512, D=64"] == verdict


def test_costs_of_the_host_are_bounds_from_above():
    records = [claim("host: candidate_attention"), claim("host: replayed graph", host_seconds=6e-6)]
    found = verdicts(records)
    assert found["host cost of one operator call"] == "reached"
    assert found["host cost of a replayed graph"] == "MISSED"


def test_a_workspace_is_found():
    assert verdicts([claim(peak_bytes=10 * 2**20)])["forward workspace"] == "MISSED"


def test_the_table_says_where_the_worst_was():
    lines = target_table(targets([claim(), claim(m=16, memory_fraction=0.79)]))
    (line,) = [line for line in lines if line.startswith("of memory peak, D=64")]
    assert "0.79" in line
    assert "N=100000 m=16 D=64" in line
    assert line.endswith("MISSED")


# -- tuning ------------------------------------------------------------------------------------------------------------

KIND = Kind("forward", 1, 2, 64, 2)


def test_a_configuration_is_launched_while_it_is_tried_and_no_longer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(launch, "TABLE", {})
    device, tried = torch.device("cuda"), LaunchConfig(128, 64, 8, 3)
    with gpu_tuning.configured("a GPU", KIND, tried):
        assert launch_config(KIND, device, None) == tried
    assert launch_config(KIND, device, None) == launch.rule(KIND)


def test_the_rule_is_tried_first_and_taller_tiles_too():
    configs = gpu_tuning.candidates(KIND)
    assert configs[0] == launch.rule(KIND)
    assert {config.block_m for config in configs} == {64, 128}
    assert len(set(configs)) == len(configs)


def test_the_best_configuration_is_one_that_ran_at_every_shape():
    tried = [{"of_rule": 1.0}, {"of_rule": None}, {"of_rule": 0.8}]
    assert gpu_tuning.best(tried) is tried[2]
    assert gpu_tuning.best([{"of_rule": None}]) is None


def test_configurations_are_timed_against_the_rule(bench, monkeypatch):
    monkeypatch.setattr(gpu_tuning, "candidates", lambda kind: launch.alternatives(kind)[:3])
    trial = gpu_tuning.Trial(Kind("backward_shared", 1, 2, 16, 2), (Shape(6, 1, 5, 16, h=2), Shape(4, 1, 5, 16, h=2)))
    tried = gpu_tuning.timed(bench, trial)
    assert [entry["failure"] for entry in tried] == [None] * 3
    assert tried[0]["of_rule"] == 1.0
    assert all(len(entry["seconds"]) == 2 and entry["of_rule"] > 0 for entry in tried)
    json.dumps(tried)


def test_the_table_is_source_that_launch_can_take():
    entry = {"kind": KIND._asdict(), "config": LaunchConfig(128, 64, 8, 3)._asdict(), "of_rule": 0.9}
    source = "\n".join(gpu_tuning.table_lines("a GPU", [entry, entry | {"of_rule": 0.99}]))
    names = {"Kind": Kind, "LaunchConfig": LaunchConfig}
    exec(source, names)
    assert names["TABLE"] == {"a GPU": {KIND: LaunchConfig(128, 64, 8, 3)}}
    assert gpu_tuning.table_lines("a GPU", []) == ["TABLE = {}  # nothing beats the rule"]


# -- command line ------------------------------------------------------------------------------------------------------


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=gpu.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_gpu_the_command_says_so_and_ends_with_2():
    result = run("--quick")
    assert result.returncode == 2
    assert result.stderr == "python -m benchmarks.gpu needs a GPU: none is visible\n"
    assert result.stdout == ""


def test_a_report_needs_no_gpu(tmp_path, capsys):
    write_json(tmp_path / "gpu_attention.json", {"records": [claim(device="H100")]})
    assert gpu.main(["--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "measured on H100" in out
    assert "of memory peak, D=64, m<=128, N>=1e5" in out
    assert "python -m benchmarks.gpu_ranking" in out


def test_an_unknown_group_is_refused():
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "everything"])


def write_test(folder: Path, body: str) -> str:
    path = folder / "test_it.py"
    path.write_text(body)
    return str(path)


def test_correctness_counts_what_passed(tmp_path):
    body = "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n"
    outcome = gpu.correctness(tmp_path / "out", 60.0, [write_test(tmp_path, body)])
    assert (outcome["passed"], outcome["tests"], outcome["skipped"]) == (True, 2, 1)
    assert gpu.correctness_lines(outcome) == ["correctness: 1 tests passed, 1 skipped"]
    assert json.loads((tmp_path / "out" / "correctness.json").read_text())["passed"] is True
    assert "1 passed, 1 skipped" in (tmp_path / "out" / "correctness.log").read_text()


def test_correctness_names_what_failed(tmp_path):
    outcome = gpu.correctness(tmp_path, 60.0, [write_test(tmp_path, "def test_a(): assert 1 == 2\n")])
    assert outcome["passed"] is False
    first, second = gpu.correctness_lines(outcome)
    assert first.startswith("correctness: 1 of 1 tests failed")
    assert "test_a: assert 1 == 2" in second


def test_tests_that_do_not_end_in_time_have_not_passed(tmp_path):
    body = "import time\ndef test_a(): time.sleep(60)\n"
    outcome = gpu.correctness(tmp_path, 1.0, [write_test(tmp_path, body)])
    assert outcome["passed"] is False
    assert outcome["exit_status"] is None
    assert "did not end in time" in gpu.correctness_lines(outcome)[0]


@pytest.fixture
def a_gpu(monkeypatch, bench):
    """Make the command believe in a GPU, and its groups note that they ran."""
    ran = []

    def breaks(bench):
        ran.append("attention")
        raise RuntimeError("illegal address")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A GPU")
    monkeypatch.setattr(gpu, "machine_at_hand", lambda arguments, commit: bench.machine)
    monkeypatch.setattr(gpu, "GROUPS", {"attention": breaks, "layer": lambda bench: ran.append("layer")})
    monkeypatch.setattr(gpu, "correctness", lambda folder, seconds: OUTCOME)
    return ran


OUTCOME = {"passed": False, "tests": 3, "skipped": 0, "exit_status": 1, "failures": [{"test": "t", "message": "m"}]}


def test_nothing_is_timed_after_a_failed_test(a_gpu, tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert a_gpu == []
    assert "nothing was timed" in capsys.readouterr().out
    assert gpu.main(["--output", str(tmp_path), "--keep-going"]) == 1
    assert a_gpu == ["attention", "layer"]


def test_a_group_that_breaks_off_stops_no_other(a_gpu, tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--only", "layer", "--only", "attention"]) == 1
    assert a_gpu == ["attention", "layer"]
    out = capsys.readouterr().out
    assert "attention: stopped by RuntimeError: illegal address" in out
    assert "targets of docs/design.md section 7" in out
    assert gpu.main(["--output", str(tmp_path), "--only", "layer"]) == 0


def test_interpreted_kernels_are_not_timed(a_gpu, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_timed(bench):
    device = torch.device("cuda", torch.cuda.current_device())
    on_gpu = Bench(bench.machine._replace(device=device), "triton", bench.folder, seconds=0.01)
    group = MeasuredGroup("attention", on_gpu)
    rivals = eager_rivals() | compiled_rivals()
    with torch.no_grad():
        measure(group, attention_workload(on_gpu, Shape(300, 1, 64, 64, h=2), BF16, rivals))
    assert_whole(group.records)
    names = {record["backend"] for record in group.records}
    assert names >= {"triton", "sdpa-expanded", "einsum-concatenated", "two-pass", "two-pass-compiled", "flex-compiled"}
    records = training(on_gpu, [Shape(4, 1, 16, 64, h=2, batch=4)], [Shape(300, 1, 64, 64, h=2)], compile_too=False)
    assert "triton" in {record["backend"] for record in records}
    assert "host: replayed graph" in {record["operator"] for record in host(on_gpu, Shape(16, 1, 16, 64, h=2), calls=5)}


def test_the_correctness_tests_exist():
    assert all((gpu.ROOT / name).is_file() for name in gpu.CORRECTNESS_TESTS)
