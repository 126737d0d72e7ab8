"""The GPU benchmark's command: wrong and interpreted kernels are not timed; on a GPU, that its groups run."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.attention import BF16, Bench, Shape, attention_workload, measure, training
from benchmarks.gpu.attention import Group as MeasuredGroup
from benchmarks.gpu.formulations import compiled_rivals, eager_rivals
from benchmarks.gpu.layer import host
from tests.benchmarks.gpu_cases import assert_whole, make_bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return make_bench(tmp_path)


def outcome_of(folder: Path, body: str, seconds: float, monkeypatch) -> dict:
    """Run a file of tests as if it were the operators'."""
    # workers would take longer to start than the tests to run
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    path = folder / "test_it.py"
    path.write_text("import pytest, time\n" + body)
    return gpu.correctness(folder, seconds, [str(path)])


def test_correctness_counts_tests_and_names_what_failed(tmp_path, monkeypatch):
    body = "def test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\ndef test_c(): assert 1 == 2\n"
    outcome = outcome_of(tmp_path, body, 60.0, monkeypatch)
    assert (outcome["passed"], outcome["tests"], outcome["skipped"]) == (False, 3, 1)
    assert json.loads((tmp_path / "correctness.json").read_text())["passed"] is False
    first, second = gpu.correctness_lines(outcome)
    assert first.startswith("correctness: 1 of 3 tests failed")
    assert "test_c: assert 1 == 2" in second


def test_tests_that_do_not_end_in_time_have_not_passed(tmp_path, monkeypatch):
    outcome = outcome_of(tmp_path, "def test_a(): time.sleep(60)\n", 1.0, monkeypatch)
    assert outcome["passed"] is False
    assert "did not end in time" in gpu.correctness_lines(outcome)[0]


def test_the_correctness_tests_exist():
    assert all((gpu.ROOT / name).is_file() for name in gpu.CORRECTNESS_TESTS)


def test_nothing_is_timed_after_a_failed_test_nor_with_interpreted_kernels(bench, tmp_path, monkeypatch, capsys):
    ran = []
    failed = {"test": "t", "message": "m"}
    outcome = {"passed": False, "tests": 3, "skipped": 0, "exit_status": 1, "failures": [failed]}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A GPU")
    monkeypatch.setattr(gpu, "machine_at_hand", lambda arguments, commit: bench.machine)
    monkeypatch.setattr(gpu, "GROUPS", {"attention": ran.append})
    monkeypatch.setattr(gpu, "correctness", lambda folder, seconds: outcome)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert "nothing was timed" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--output", str(tmp_path), "--keep-going"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert ran == []


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
