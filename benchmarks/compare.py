"""Fail when a ratio to a rival, or a fraction of the limit, is lower than the committed record allows.

``python -m benchmarks.compare --quick`` measures a few cases now, on one CPU thread, in about a minute: CI runs it.
``python -m benchmarks.compare FOUND.json`` compares what ``pytest --benchmark-only --benchmark-json=FOUND.json`` wrote.
Milliseconds are never compared. Exit code 1 means that a figure fell or is no longer measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.machine import MachineError, computing_threads, kind_name, machine_facts, nearest
from benchmarks.measuring.peaks import best_peaks, products_of
from benchmarks.suite.case import Budget, Case, Record, run_case, run_until_quiet
from benchmarks.suite.pytest_cases import skipped_entry
from benchmarks.suite.results import (
    GATE,
    GROUPS,
    Results,
    case_name,
    committed_records,
    kind_mismatch,
    machines,
    refused,
    split,
    write_results,
)

KEPT = 0.6
"""Least share of the committed figure that passes, on a quiet machine. In two recordings of the suite an hour apart, on
an idle virtual machine, six of 208 figures fell below three quarters of the other's, the worst to 0.65: calls that
allocate new memory vary most."""

KEPT_OF_FRESH = 0.35
"""The same for ratios to a rival that allocates more than `FRESH_BYTES` per call: the speed of allocating so much
differs twofold between processes (expanded SDPA at m = 256: 59x, 108x and 47x in three recordings)."""
FRESH_BYTES = 2**28

KEPT_IN_CI = 0.5
"""The same for ratios on every push, while other work runs on the same cores. Contenders take turns on one thread, so
that a busy machine slows all of them; two threads would wait for each other, and a contender that synchronises them
more often would be slowed more. Losing a fast path, for example by expanding shared keys, costs far more than half."""

ATTEMPTS = 4
"""How often a quick case is measured before it fails; the best attempt counts."""

QUICK_BUDGET = Budget(seconds=0.1, least=3, most=10)
LAST_BUDGET = Budget(seconds=0.5, least=5, most=20)
"""Budget of the last attempt."""

Figures = dict[tuple[str, str, str], float]
"""(case, contender, what) -> figure; what is "ratio to RIVAL" or "fraction of the limit"."""


class Fall(NamedTuple):
    """A figure that is lower than the committed figure allows."""

    case: str
    backend: str
    what: str
    committed: float
    found: float

    def __str__(self) -> str:
        return f"{self.case}: {self.backend}, {self.what}: {self.committed:.3g} committed, {self.found:.3g} found"


class Verdict(NamedTuple):
    """Result of a comparison."""

    compared: int
    falls: list[Fall]
    missing: list[str]
    """Committed figures that were not measured, without a reason."""
    not_run: list[str]
    """Committed figures that were not measured, with the reason."""
    unrecorded: list[str]
    """Measured cases that have no committed record."""

    @property
    def passed(self) -> bool:
        """Whether nothing fell and nothing is missing."""
        return not self.falls and not self.missing

    def lines(self) -> list[str]:
        """Return the lines to print."""
        return [
            *(f"fell: {fall}" for fall in self.falls),
            *(f"missing: {name}; if intended, record again: python -m benchmarks.record" for name in self.missing),
            *(f"not run: {name}" for name in self.not_run),
            *(f"no committed record: {name}" for name in self.unrecorded),
            f"{self.compared} figures compared, {len(self.falls)} fell, {len(self.missing)} missing",
        ]


def figures(records: Iterable[Record], *, fractions: bool) -> Figures:
    """Figures to compare: this library's ratios to every rival and, with `fractions`, its fractions of the limit."""
    found: Figures = {}
    for record in records:
        if not record["own"]:
            continue
        key = case_name(record), record["backend"]
        found |= {(*key, f"ratio to {rival}"): ratio for rival, ratio in record["ratios"].items()}
        # a fraction above 1 is an error of measurement, not a claim
        if fractions and record["fraction_of_limit"] <= 1:
            found[*key, "fraction of the limit"] = record["fraction_of_limit"]
    return found


def best(attempts: Iterable[Figures]) -> Figures:
    """Return the best attempt of every figure."""
    found: Figures = {}
    for attempt in attempts:
        for key, value in attempt.items():
            found[key] = max(value, found.get(key, value))
    return found


def fresh_rivals(records: Iterable[Record]) -> set[tuple[str, str]]:
    """Return (case, "ratio to RIVAL") of rivals that allocate more than `FRESH_BYTES`."""
    return {
        (case_name(record), f"ratio to {record['backend']}")
        for record in records
        if not record["own"] and (record["peak_bytes"] or 0) > FRESH_BYTES
    }


def compare(
    committed: Figures,
    found: Figures,
    *,
    kept: float,
    fresh: Collection[tuple[str, str]] = (),
    skipped: Iterable[Mapping[str, Any]] = (),
) -> Verdict:
    """Compare figures with committed ones.

    Args:
        committed, found: results of `figures`.
        kept: least share of a committed figure that passes.
        fresh: result of `fresh_rivals`, for which `KEPT_OF_FRESH` is enough.
        skipped: entries of contenders that did not run, with their reasons.
    """
    reasons = {(case_name(entry), entry["backend"]): entry["reason"] for entry in skipped}
    falls, missing, not_run = [], [], []
    for (case, backend, what), before in committed.items():
        if (case, backend, what) in found:
            after = found[case, backend, what]
            least = min(kept, KEPT_OF_FRESH) if (case, what) in fresh else kept
            if not after >= least * before:
                falls.append(Fall(case, backend, what, before, after))
            continue
        contenders = (backend, what.removeprefix("ratio to "))
        reason = next((reasons[case, name] for name in contenders if (case, name) in reasons), None)
        name = f"{case}: {backend}, {what}"
        if reason is None:
            missing.append(name)
        else:
            not_run.append(f"{name}: {reason}")
    known = {case for case, _, _ in committed}
    unrecorded = sorted({case for case, _, _ in found} - known)
    return Verdict(len(committed.keys() & found.keys()), falls, missing, not_run, unrecorded)


def quick_cases() -> list[Case]:
    """Return the cases that CI measures, each with its `quick` rivals only."""
    from benchmarks.suite import end_to_end, index, layers, operators

    modules = (operators, layers, end_to_end, index)
    return [replace(case, rivals=case.quick) for module in modules for case in module.CASES if case.quick]


def run_quick(
    cases: Sequence[Case], committed: Figures, measure: Callable[[Case, Budget], Iterable[Record]]
) -> Verdict:
    """Measure every case, again while a figure fell, and compare the best attempt.

    Args:
        cases: what to measure; those without a committed record are listed but not measured.
        committed: result of `figures`.
        measure: runs a case.
    """
    found: Figures = {}
    known = {case for case, _, _ in committed}
    wanted = {key: value for key, value in committed.items() if key[0] in {case.name for case in cases}}
    skipped = [
        skipped_entry(case, name, reason)
        for case in cases
        for name in case.contenders
        if (reason := case.unavailable(name)) is not None
    ]
    for case in (case for case in cases if case.name in known):
        own = {key: value for key, value in wanted.items() if key[0] == case.name}
        for attempt in range(ATTEMPTS):
            budget = LAST_BUDGET if attempt == ATTEMPTS - 1 else QUICK_BUDGET
            found = best([found, figures(measure(case, budget), fractions=False)])
            if not compare(own, {key: found[key] for key in own.keys() & found.keys()}, kept=KEPT_IN_CI).falls:
                break
    verdict = compare(wanted, found, kept=KEPT_IN_CI, skipped=skipped)
    return verdict._replace(unrecorded=[case.name for case in cases if case.name not in known])


def record_quick(device: str | None) -> Results:
    """Measure the quick cases and write the results into a device's folder.

    Args:
        device: name of the folder; None: named after this kind of machine.

    Raises:
        MachineError: the folder holds records of another kind of machine.
    """
    device = device or kind_name(machine_facts())
    with computing_threads(1):
        machine = machine_facts()
        if reason := kind_mismatch(device, machine, (GATE,)):
            raise MachineError(reason)
        records, skipped = [], []
        for case in quick_cases():
            outcome = run_until_quiet(case, LAST_BUDGET)
            records += outcome.records.values()
            skipped += [skipped_entry(case, name, why) | {"refused": True} for name, why in outcome.refused.items()]
        peaks = {products: best_peaks(products)._asdict() for products in map(products_of, records)}
        provenance = {
            "command": f"python -m benchmarks.compare --quick --record {device}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "timing": "medians of interleaved rounds, one thread",
        }
        found = Results(machine, peaks, records, skipped, provenance)
        if records:
            print(f"written: {write_results(device, GATE, found)}")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 if a figure fell, is missing, or was too noisy to record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="measure a few cases now and compare only ratios")
    what.add_argument("found", type=Path, nargs="?", help="file written by pytest --benchmark-json")
    parser.add_argument(
        "--device", help="folder of results to compare with, of a machine of this kind (default: the most similar)"
    )
    parser.add_argument(
        "--kept",
        type=float,
        default=KEPT,
        help=f"least share of a committed figure that passes (default: {KEPT}; not with --quick)",
    )
    parser.add_argument(
        "--record",
        metavar="DEVICE",
        nargs="?",
        const="",
        help="with --quick: do not compare, write the results (default folder: named after this kind of machine)",
    )
    options = parser.parse_args(arguments)
    if options.record is not None and not options.quick:
        parser.error("--record is for --quick; python -m benchmarks.record writes the other results")
    try:
        if options.record is not None:
            noisy = refused(record_quick(options.record))
            for line in noisy:
                print(line)
            return int(bool(noisy))
        if options.quick:
            verdict = _compare_quick(options.device)
        else:
            verdict = _compare_file(options.found, options.device, options.kept)
    except MachineError as error:
        parser.error(str(error))
    print("nothing compared" if verdict is None else "\n".join(verdict.lines()))
    return 0 if verdict is None or verdict.passed else 1


def _compare_quick(device: str | None) -> Verdict | None:
    """Measure and compare the quick cases; None without a record of this kind of machine."""
    with computing_threads(1):
        device = _choose_device(device, machine_facts(), (GATE,))
        if device is None:
            return None
        committed = figures(committed_records(device, (GATE,)), fractions=False)
        return run_quick(quick_cases(), committed, lambda case, budget: run_case(case, budget).records.values())


def _compare_file(path: Path, device: str | None, kept: float) -> Verdict | None:
    """Compare a file that pytest wrote; None without a record of its kind of machine."""
    document = json.loads(path.read_text(encoding="utf-8"))
    device = _choose_device(device, document["machine_info"]["facts"], GROUPS)
    if device is None:
        return None
    groups = split(document, str(path))
    found = [record for group in groups.values() for record in group.records]
    # a run of one group says nothing about the others
    records = [record for record in committed_records(device) if record["group"] in groups]
    skipped = [entry for group in groups.values() for entry in group.skipped]
    before, after = (figures(some, fractions=True) for some in (records, found))
    return compare(before, after, kept=kept, fresh=fresh_rivals(records), skipped=skipped)


def _choose_device(device: str | None, machine: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Choose the device whose files `names` to compare with, and print why; None if none is of the same kind.

    Raises:
        MachineError: `device` is given but has no such file.
    """
    recorded = machines(names)
    if device is not None:
        if device not in recorded:
            raise MachineError(
                f"{device} has no record to compare with; expected one of {', '.join(recorded) or 'none'}"
            )
        recorded = {device: recorded[device]}
    device, why = nearest(machine, recorded)
    print(why)
    return device


if __name__ == "__main__":
    sys.exit(main())
