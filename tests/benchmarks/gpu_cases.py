"""What tests of the GPU benchmark share: a bench that stands on a CPU, and what records are."""

import json
from pathlib import Path

import torch

from benchmarks.gpu.attention import Bench
from benchmarks.gpu.records import RECORD_KEYS, Machine
from mixkernels.roofline import Peaks

CPU = torch.device("cpu")
PEAKS = Peaks(1e12, 1e11, 1e11)


def make_bench(folder: Path) -> Bench:
    """A bench whose results go to a folder."""
    machine = Machine(CPU, "a test", lambda dtype: (PEAKS, "made up"), PEAKS, {"torch": "0"}, "abc", {"command": "x"})
    # shapes so small are all noise
    return Bench(machine, "torch", folder, seconds=0.0, largest_spread=float("inf"))


def assert_whole(records):
    for record in records:
        assert set(record) == set(RECORD_KEYS)
        assert record["seconds"] > 0
        assert record["samples"] >= 5
        assert record["commit"] == "abc"
        assert record["provenance"]["peaks"] == "made up"
    json.dumps(records)


def claim(operator="candidate_attention", n=100_000, m=64, d=64, **changes):
    record = dict.fromkeys(RECORD_KEYS)
    shape = {"B": 1, "N": n, "k": 1, "m": m, "H": 12, "D": d}
    record |= {"operator": operator, "backend": "triton", "dtype": "bfloat16", "shape": shape}
    record |= {"memory_fraction": 0.85, "tflops": 100.0, "peak_bytes": 10, "output_bytes": 10, "host_seconds": 20e-6}
    record["ratios"] = {"two-pass": 5.0, "two-pass-cudnn": 3.5, "flex-compiled": 1.5, "sdpa-expanded": 30.0}
    return record | changes
