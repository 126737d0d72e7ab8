"""Skip benchmarks without --benchmark-only, run cases side by side, and add provenance to every record."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.attention import Bench
from benchmarks.gpu.records import machine_at_hand
from benchmarks.measuring.machine import built_from, machine_facts
from benchmarks.measuring.peaks import all_peaks
from benchmarks.suite.pytest_cases import CaseRunner, GpuCaseRunner, skipped_entry
from mixencoder import __version__

SKIPPED = pytest.StashKey[list[dict[str, Any]]]()
"""Cases that a session left out, with the reasons."""
_LONG = 'takes minutes: run pytest --benchmark-only -m "long or not long"'


def pytest_configure(config: pytest.Config) -> None:
    """Show medians, which records hold, and sort by them, unless options say otherwise."""
    config.stash[SKIPPED] = []
    if not any(str(argument).startswith("--benchmark-sort") for argument in config.invocation_params.args):
        config.option.benchmark_sort = "median"
    if getattr(config.option, "benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("benchmark_only", False)
    long_wanted = "long" in config.getoption("markexpr")
    for item in items:
        if not item.path.name.startswith("bench_"):
            continue
        if not wanted:
            item.add_marker(pytest.mark.skip(reason="a benchmark: run pytest --benchmark-only"))
        elif item.get_closest_marker("long") and not long_wanted:
            item.add_marker(pytest.mark.skip(reason=_LONG))
            parameters = item.callspec.params
            config.stash[SKIPPED].append(skipped_entry(parameters["case"], parameters["contender"], _LONG))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: none is visible"))


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> CaseRunner:
    return CaseRunner(pytestconfig.stash[SKIPPED])


@pytest.fixture(scope="session")
def gpu_runner(tmp_path_factory: pytest.TempPathFactory) -> GpuCaseRunner:
    folder: Path = tmp_path_factory.mktemp("gpu")
    return GpuCaseRunner(Bench(machine_at_hand(sys.argv[1:], None), "triton", folder, quick=True))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info["mixencoder"] = __version__
    machine_info["facts"] = machine_facts()
    machine_info["versions"] = built_from()["versions"]
    machine_info["peaks"] = all_peaks()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["skipped"] = config.stash[SKIPPED]
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)
        # these are objects, a case and its contender; the record names both
        record.pop("params", None)
    for noise in ("flags", "hz_actual", "hz_actual_friendly"):
        output_json["machine_info"]["cpu"].pop(noise, None)
