"""The benchmark of the exported model: its measure, and what it records, with processes that cost nothing."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks.processes import onnx
from benchmarks.report import process_tables


def test_ndcg_is_that_of_the_formula_and_ties_count_against_the_model():
    assert onnx.ndcg(np.array([3.0, 2.0, 1.0]), [1, 0, 0]) == 1
    assert onnx.ndcg(np.array([1.0, 1.0]), [1, 0]) == pytest.approx(1 / math.log2(3))
    # grades 2 and 1 in the wrong order, at ranks 1 and 2
    assert onnx.ndcg(np.array([2.0, 1.0]), [1, 2]) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert onnx.ndcg(np.arange(20.0), [1, *[0] * 19]) == 0


def test_parts_are_recorded_together_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "ROOT", tmp_path)
    monkeypatch.setattr(process_tables, "RESULTS", tmp_path / "benchmarks" / "results")
    device = process_tables.DEVICE
    (tmp_path / "benchmarks" / "results" / device).mkdir(parents=True)
    for kind in onnx.KINDS:
        (tmp_path / "exported" / kind).mkdir(parents=True)
        (tmp_path / "exported" / kind / "score.onnx").write_bytes(b"0" * 2_000_000)
    figures = {"onnxruntime, float32": 0.9, "onnxruntime, int8": 0.8, "mixencoder": 0.9}
    monkeypatch.setattr(onnx, "quality", lambda exported, data: {"quality": {"dev": {"queries": 3, **figures}}})
    turns = iter(range(100))
    # the first round, of three processes, is left out
    monkeypatch.setattr(onnx, "measured", lambda command: (float(next(turns)), 5e6))
    options = ["--device", device, "--exported", str(tmp_path / "exported")]
    onnx.main(["quality", *options])
    onnx.main(["seconds", *options, "--python", sys.executable, "--rounds", "1"])
    record = json.loads((tmp_path / "benchmarks" / "results" / device / "onnx.json").read_text())
    assert record["seconds"] == {"onnxruntime, float32": 3, "onnxruntime, int8": 4, "mixencoder": 5}
    # paths of this machine are not recorded
    assert str(tmp_path) not in json.dumps(record)
    table = process_tables.onnx_table()
    assert "| onnxruntime, int8 | 0.800 | 4.00 s | 5 MB | 2 MB |" in table
    assert "| mixencoder | 0.900 | 5.00 s | 5 MB |  |" in table


def test_a_process_is_timed_with_its_memory():
    seconds, peak = onnx.measured([sys.executable, "-c", "x = bytearray(50_000_000)"])
    assert 0 < seconds < 60
    assert 50e6 < peak < 1e9
