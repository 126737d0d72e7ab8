"""The gate: fails when a ratio to a rival, or a fraction of the limit, fell against the committed record.

``python -m benchmarks.compare --quick`` measures a few cases now, on one CPU thread, in about a minute: CI runs it.
``python -m benchmarks.compare FOUND.json`` compares what ``pytest --benchmark-only --benchmark-json=FOUND.json`` wrote.
Milliseconds are never compared. Exit code 1 says that something fell or is no longer measured.
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
from benchmarks.suite.case import Budget, Case, Record, run_case, run_quietly
from benchmarks.suite.pytest_cases import skipped_entry
from benchmarks.suite.results import (
    GATE,
    GROUPS,
    Results,
    case_name,
    committed_records,
    machines,
    of_another_kind,
    refused,
    split,
    write_results,
)

KEPT = 0.6
"""Share of the committed figure that must be left on a quiet machine. Of two recordings of the suite an hour apart, on
a virtual machine with nothing else to do, six of 208 figures kept less than three quarters, the worst 0.65: what meets
fresh memory varies most."""

KEPT_OF_FRESH = 0.35
"""The same for ratios to a rival that fills more than `FRESH_BYTES` at a call: how fast a machine hands out so much
memory differs twofold from process to process (expanded SDPA at m = 256: 59x, 108x and 47x in three recordings)."""
FRESH_BYTES = 2**28

KEPT_IN_CI = 0.5
"""The same for ratios on every push, beside other work on the same cores. Contenders take turns on one thread, so that
a busy machine slows all of them; two threads would wait for one another, and who joins them more often would fall
behind. A path that is lost, such as expanding shared keys, costs far more than half."""

ATTEMPTS = 4
"""How often a quick case is measured before it counts as fallen; the best attempt counts."""

QUICK_BUDGET = Budget(seconds=0.1, least=3, most=10)
LAST_BUDGET = Budget(seconds=0.5, least=5, most=20)
"""Of the last attempt."""

Figures = dict[tuple[str, str, str], float]
"""(case, contender, what) -> figure; what is "ratio to RIVAL" or "fraction of the limit"."""


class Fall(NamedTuple):
    """A figure that is lower than the committed one allows."""

    case: str
    backend: str
    what: str
    committed: float
    found: float

    def __str__(self) -> str:
        return f"{self.case}: {self.backend}, {self.what}: {self.committed:.3g} committed, {self.found:.3g} found"


class Verdict(NamedTuple):
    """What a comparison says."""

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
        """What to print."""
        return [
            *(f"fell: {fall}" for fall in self.falls),
            *(f"missing: {name}; record anew if this is meant: python -m benchmarks.record" for name in self.missing),
            *(f"not run: {name}" for name in self.not_run),
            *(f"no committed record: {name}" for name in self.unrecorded),
            f"{self.compared} figures compared, {len(self.falls)} fell, {len(self.missing)} missing",
        ]


def figures(records: Iterable[Record], *, fractions: bool) -> Figures:
    """What is compared of records: this library's ratios to every rival and, if wanted, its fractions of the limit."""
    found: Figures = {}
    for record in records:
        if not record["own"]:
            continue
        key = case_name(record), record["backend"]
        found |= {(*key, f"ratio to {rival}"): ratio for rival, ratio in record["ratios"].items()}
        # above 1 it is no claim
        if fractions and record["fraction_of_limit"] <= 1:
            found[*key, "fraction of the limit"] = record["fraction_of_limit"]
    return found


def best(attempts: Iterable[Figures]) -> Figures:
    """Every figure's best attempt."""
    found: Figures = {}
    for attempt in attempts:
        for key, value in attempt.items():
            found[key] = max(value, found.get(key, value))
    return found


def fresh_rivals(records: Iterable[Record]) -> set[tuple[str, str]]:
    """(case, "ratio to RIVAL") of rivals that fill more than `FRESH_BYTES`."""
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
        committed, found: of `figures`.
        kept: share of a committed figure that must be left.
        fresh: of `fresh_rivals`, for which `KEPT_OF_FRESH` is enough.
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
    """The cases that CI measures, against the rivals that they name for it."""
    from benchmarks.suite import end_to_end, index, layers, operators

    modules = (operators, layers, end_to_end, index)
    return [replace(case, rivals=case.quick) for module in modules for case in module.CASES if case.quick]


def run_quick(
    cases: Sequence[Case], committed: Figures, measure: Callable[[Case, Budget], Iterable[Record]]
) -> Verdict:
    """Measure cases, each again while something fell, and judge the best attempt.

    Args:
        cases: what to measure; those without a committed record are named and not measured.
        committed: of `figures`.
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
    """Measure the quick cases and commit what was found to a device's folder of results.

    Args:
        device: name of the folder; without it the kind's of this machine.

    Raises:
        MachineError: the folder has a record of another kind of machine.
    """
    device = device or kind_name(machine_facts())
    with computing_threads(1):
        machine = machine_facts()
        if reason := of_another_kind(device, machine, (GATE,)):
            raise MachineError(reason)
        records, skipped = [], []
        for case in quick_cases():
            outcome = run_quietly(case, LAST_BUDGET)
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
    """Command line; returns 1 if something fell, is missing, or was refused a record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="measure a few cases now, compare ratios alone")
    what.add_argument("found", type=Path, nargs="?", help="file that pytest --benchmark-json wrote")
    parser.add_argument(
        "--device", help="folder of results to compare with, if its machine is of this kind; without it the nearest"
    )
    parser.add_argument(
        "--kept", type=float, default=KEPT, help="share of a figure that must be left (not with --quick)"
    )
    parser.add_argument(
        "--record",
        metavar="DEVICE",
        nargs="?",
        const="",
        help="with --quick: compare nothing, commit what is found; without a name to this kind of machine's",
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
        verdict = _quick(options.device) if options.quick else _whole(options.found, options.device, options.kept)
    except MachineError as error:
        parser.error(str(error))
    print("nothing compared" if verdict is None else "\n".join(verdict.lines()))
    return 0 if verdict is None or verdict.passed else 1


def _quick(device: str | None) -> Verdict | None:
    """Measure and judge the quick cases; None without a record of a machine of this kind."""
    with computing_threads(1):
        device = _record_of(device, machine_facts(), (GATE,))
        if device is None:
            return None
        committed = figures(committed_records(device, (GATE,)), fractions=False)
        return run_quick(quick_cases(), committed, lambda case, budget: run_case(case, budget).records.values())


def _whole(path: Path, device: str | None, kept: float) -> Verdict | None:
    """Judge what pytest wrote; None without a record of a machine of its kind."""
    document = json.loads(path.read_text(encoding="utf-8"))
    device = _record_of(device, document["machine_info"]["facts"], GROUPS)
    if device is None:
        return None
    groups = split(document, str(path))
    found = [record for group in groups.values() for record in group.records]
    # a run of one group says nothing of the others
    records = [record for record in committed_records(device) if record["group"] in groups]
    skipped = [entry for group in groups.values() for entry in group.skipped]
    before, after = (figures(some, fractions=True) for some in (records, found))
    return compare(before, after, kept=kept, fresh=fresh_rivals(records), skipped=skipped)


def _record_of(device: str | None, machine: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Say which device's files of some names a machine is compared with, and return its name; None: of no kind like it.

    Raises:
        MachineError: the device that was asked for has no such file.
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
