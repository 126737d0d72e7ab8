"""The GPU benchmark's command, without a GPU and with a made-up one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.attention import (
    BF16,
    Bench,
    Shape,
    attention_workload,
    measure,
    training,
)
from benchmarks.gpu.attention import Group as MeasuredGroup
from benchmarks.gpu.formulations import (
    compiled_rivals,
    eager_rivals,
)
from benchmarks.gpu.layer import host
from benchmarks.measuring.provenance import write_json
from tests.benchmarks.gpu_cases import assert_whole, claim, make_bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return make_bench(tmp_path)


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
    assert "python -m benchmarks.gpu.ranking" in out


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
