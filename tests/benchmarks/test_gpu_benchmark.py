"""The GPU benchmark's command, without a GPU and with a made-up one."""

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
from tests.benchmarks.gpu_cases import assert_whole, make_bench


@pytest.fixture
def bench(tmp_path) -> Bench:
    return make_bench(tmp_path)


def write_test(folder: Path, body: str) -> str:
    path = folder / "test_it.py"
    path.write_text(body)
    return str(path)


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
