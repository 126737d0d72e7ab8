"""The machine at hand as a record names it, and which recorded machine is like it."""

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
"""What decides which of two contenders is faster: ratios of machines that differ in one of these do not compare. The
processor alone does not: a virtual machine or a variable may hide instructions that it has."""
_LATER = ("native_int8", "tiles")
"""Those that the first records did not note; there they are taken as the processor's."""

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
"""What processors that many servers have are called; others go by their numbers."""


class MachineError(ValueError):
    """A folder of results and a machine do not go together."""


def machine_facts() -> dict[str, Any]:
    """What this CPU is and how it is used: all of `KIND`, and its name."""
    cpu = _cpuinfo()
    return {
        "kind": "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": multiplies_natively(torch.bfloat16),
        "native_int8": torch.cpu._is_vnni_supported(),
        "tiles": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "name": cpu.get("model name", platform.processor() or platform.machine()),
        # what ARM's processors say stands second
        "vendor": cpu.get("vendor_id") or cpu.get("CPU implementer", platform.machine()),
        "family": cpu.get("cpu family") or cpu.get("CPU architecture", ""),
        "model": cpu.get("model") or cpu.get("CPU part", platform.processor()),
    }


@contextmanager
def computing_threads(count: int) -> Generator[None]:
    """Compute on so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; none where the system does not have them."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def machine_kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a machine's facts must agree before figures are compared."""
    return {fact: facts.get(fact) for fact in KIND if fact in facts or fact not in _LATER}


def kind_name(facts: Mapping[str, Any]) -> str:
    """Name of a kind's folder of results, such as ``cpu-zen3-2-threads``."""
    kind = machine_kind(facts)
    numbers = tuple(str(kind[fact]) for fact in ("vendor", "family", "model"))
    processor = _NAMES.get(numbers) or re.sub("^(authentic|genuine)", "", slug(" ".join(numbers)))
    return f"{kind['kind']}-{processor}-{kind['threads']}-threads"


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
    """In what the kinds of two machines differ."""
    return _differences(machine_kind(machine), machine_kind(other), KIND)


def _differences(machine: Mapping[str, Any], other: Mapping[str, Any], facts: Sequence[str]) -> list[str]:
    return [
        f"{fact} is {machine.get(fact)!r} here, {other.get(fact)!r} there"
        for fact in facts
        if machine.get(fact) != other.get(fact) and (fact not in _LATER or {fact} <= machine.keys() & other.keys())
    ]
