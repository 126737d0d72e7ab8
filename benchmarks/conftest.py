"""Skips benchmarks unless they are asked for, and gives every record its provenance."""

import pytest
import torch

from mixencoder import __version__


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only", False):
        return
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: run pytest --benchmark-only"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import triton

    machine_info.pop("node", None)
    machine_info["mixencoder"] = __version__
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = triton.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)
    for noise in ("flags", "hz_actual", "hz_actual_friendly"):
        output_json["machine_info"]["cpu"].pop(noise, None)
