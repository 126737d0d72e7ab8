"""Facts about this machine for records, and the search for a recorded machine of the same kind."""

import platform
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.provenance import commit, slug, versions
from mixkernels.devices import multiplies_natively

KIND = (
    "kind",
    "vendor",
    "family",
    "model",
    "capability",
    "native_bfloat16",
    "native_int8",
    "tiles",
    "threads",
)
"""Facts that decide which of two contenders is faster: ratios of machines that differ in one of these cannot be
compared. The processor alone is not enough: a virtual machine or a variable may hide some of its instructions."""
_ADDED_LATER = ("native_int8", "tiles")
"""Facts that the first records lack; a missing one is not compared."""

_NAMES = {
    ("AuthenticAMD", "23", "49"): "zen2",
    ("AuthenticAMD", "25", "1"): "zen3",
    ("AuthenticAMD", "25", "17"): "zen4",
    ("AuthenticAMD", "26", "2"): "zen5",
    ("GenuineIntel", "6", "85"): "skylake-server",
    ("GenuineIntel", "6", "106"): "icelake-server",
    ("GenuineIntel", "6", "143"): "sapphire-rapids",
    ("GenuineIntel", "6", "173"): "granite-rapids",
    ("GenuineIntel", "6", "207"): "emerald-rapids",
}
"""Names of common server processors, by vendor, family and model; others are named by these numbers."""


class MachineError(ValueError):
    """A folder of results belongs to another kind of machine, or has nothing to compare with."""


def machine_facts() -> dict[str, Any]:
    """Facts about this CPU and its use: all of `KIND`, and its name."""
    cpu = _cpuinfo()
    return {
        "kind": "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": multiplies_natively(torch.bfloat16),
        "native_int8": torch.cpu._is_vnni_supported(),
        "tiles": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "name": cpu.get("model name", platform.processor() or platform.machine()),
        # the second field is that of ARM's processors
        "vendor": cpu.get("vendor_id") or cpu.get("CPU implementer", platform.machine()),
        "family": cpu.get("cpu family") or cpu.get("CPU architecture", ""),
        "model": cpu.get("model") or cpu.get("CPU part", platform.processor()),
    }


@contextmanager
def computing_threads(count: int) -> Generator[None]:
    """Compute on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def machine_kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a machine that must agree before figures are compared."""
    return {fact: facts.get(fact) for fact in KIND if fact in facts or fact not in _ADDED_LATER}


def kind_name(facts: Mapping[str, Any]) -> str:
    """Name of a kind's folder of results, such as ``cpu-zen3-2-threads``."""
    kind = machine_kind(facts)
    numbers = tuple(str(kind[fact]) for fact in ("vendor", "family", "model"))
    processor = _NAMES.get(numbers) or re.sub("^(authentic|genuine)", "", slug(" ".join(numbers)))
    return f"{kind['kind']}-{processor}-{kind['threads']}-threads"


@cache
def built_from() -> dict[str, Any]:
    """Versions and commit for records, looked up once per process."""
    return {"versions": versions(), "commit": commit()}


def nearest(machine: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """Return the recorded machine to compare a machine's ratios with, and one line that says why that one or none.

    Args:
        machine: result of `machine_facts`.
        recorded: facts of machines, by name of their folder of results.

    Returns:
        Name of a machine of the same kind, the one that agrees in most other facts; or None.
    """
    if not recorded:
        return None, "no machine has a committed record"
    reasons = {name: kind_differences(machine, facts) for name, facts in recorded.items()}
    alike = {name: facts for name, facts in recorded.items() if not reasons[name]}
    if not alike:
        listed = "; ".join(f"{name}: {', '.join(differences)}" for name, differences in reasons.items())
        return None, f"no machine of this kind has a committed record ({listed})"
    name = min(alike, key=lambda one: len(_differences(machine, alike[one], tuple(machine))))
    differences = _differences(machine, alike[name], tuple(machine))
    return name, f"nearest to {name}" + (f", which differs: {', '.join(differences)}" if differences else "")


def kind_differences(machine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """List how the kinds of two machines differ."""
    return _differences(machine_kind(machine), machine_kind(other), KIND)


def _differences(machine: Mapping[str, Any], other: Mapping[str, Any], facts: Sequence[str]) -> list[str]:
    return [
        f"{fact} is {machine.get(fact)!r} here, {other.get(fact)!r} there"
        for fact in facts
        if machine.get(fact) != other.get(fact) and (fact not in _ADDED_LATER or (fact in machine and fact in other))
    ]
