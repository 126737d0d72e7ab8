"""The machine at hand as a record names it, and which recorded machine is like it."""

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_records import commit, versions
from mixkernels.devices import multiplies_natively

KIND = ("kind", "capability", "native_bfloat16", "threads")
"""What decides which of two contenders is faster: ratios of machines that differ in one of these do not compare."""


def machine_facts() -> dict[str, Any]:
    """What this CPU is and how it is used: `KIND`, and its name, vendor, family and model."""
    cpu = _cpuinfo()
    return {
        "kind": "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": multiplies_natively(torch.bfloat16),
        "threads": torch.get_num_threads(),
        "name": cpu.get("model name", platform.processor() or platform.machine()),
        "vendor": cpu.get("vendor_id", ""),
        "family": cpu.get("cpu family", ""),
        "model": cpu.get("model", ""),
    }


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; none where the system does not have them."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


@cache
def built_from() -> dict[str, Any]:
    """Versions and commit, as every record carries them; asked for once a process."""
    return {"versions": versions(), "commit": commit()}


def nearest(machine: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """The recorded machine that a machine's ratios may be compared with, and why that one or none.

    Args:
        machine: of `machine_facts`.
        recorded: facts by name of the folder of results.

    Returns:
        Name of a machine that agrees in all of `KIND`, the one that agrees in most other facts; or None.
    """
    if not recorded:
        return None, "no machine has a committed record"
    alike = {name: facts for name, facts in recorded.items() if not _differences(machine, facts, KIND)}
    if not alike:
        reasons = [f"{name}: {', '.join(_differences(machine, facts, KIND))}" for name, facts in recorded.items()]
        return None, f"no machine of this kind has a committed record ({'; '.join(reasons)})"
    name = min(alike, key=lambda one: len(_differences(machine, alike[one], tuple(machine))))
    differences = _differences(machine, alike[name], tuple(machine))
    return name, f"nearest to {name}" + (f", which differs: {', '.join(differences)}" if differences else "")


def _differences(machine: Mapping[str, Any], other: Mapping[str, Any], facts: Sequence[str]) -> list[str]:
    return [
        f"{fact} is {machine.get(fact)!r} here, {other.get(fact)!r} there"
        for fact in facts
        if machine.get(fact) != other.get(fact)
    ]
