"""A case of the suite: contenders that do the same work, checked, timed in turns in one run, recorded side by side.

The modules of `benchmarks.suite` define the cases; `benchmarks.bench_suite` runs them under pytest, and
`benchmarks.compare` checks a few of them in CI.
"""

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.measuring.machine import built_from
from benchmarks.measuring.noise import measure_until_quiet, noise, spread
from benchmarks.measuring.peaks import best_peaks, products_of, with_peaks
from benchmarks.measuring.timing import interleaved_samples, peak_bytes
from mixkernels.roofline import Cost

Record = dict[str, Any]

RECORD_KEYS = (
    "group",
    "operator",
    "variant",
    "shape",
    "dtype",
    "device",
    "backend",
    "own",
    "seconds",
    "spread",
    "samples",
    "bytes",
    "flops",
    "exps",
    "bound",
    "fraction_of_limit",
    "peak_bytes",
    "rival",
    "ratio",
    "ratios",
    "facts",
    "versions",
    "commit",
)
"""Keys of every record. "backend" is the contender, "own" whether it is this library's; "ratio" is the rival's time
divided by this contender's, "ratios" the same for all rivals; "facts" is what else a case says about a contender."""


class Contender(NamedTuple):
    """One way to do a case's work."""

    call: Callable[[], object]
    cost: Cost | None = None
    """Its least work, where contenders do different work; None: the case's."""
    factor: float = 1.0
    """Seconds of the case divided by seconds of the call: more than 1 if the call does a part of the work."""
    facts: Mapping[str, Any] = {}
    """Recorded unchanged; "products" is one of `benchmarks.measuring.peaks.PRODUCTS`, if its peaks set the limit
    instead of those of the case's dtype."""


class Prepared(NamedTuple):
    """A case with its inputs."""

    contenders: Mapping[str, Contender]
    check: Callable[[str, Any], None]
    """Takes a contender's name and result; raises AssertionError if the result is wrong."""
    cost: Cost | None = None


class Budget(NamedTuple):
    """How long a case is timed, as `interleaved_samples` takes it."""

    seconds: float = 0.2
    least: int = 3
    most: int = 20


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison: a task at one shape and dtype, and all contenders."""

    group: str
    """operators, layers, end_to_end or index."""
    operator: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    own: tuple[str, ...]
    """This library's contenders; documents show the first."""
    rivals: tuple[str, ...]
    prepare: Callable[[Collection[str]], Prepared]
    """Takes names of contenders and prepares their inputs."""
    rival: str | None = None
    """The rival of a record's "ratio"; None: the fastest."""
    unavailable: Callable[[str], str | None] = lambda name: None
    """Why a contender does not run here, or None."""
    variant: str = ""
    """Distinguishes cases of one operator, shape and dtype."""
    gradients: bool = False
    """Whether calls need autograd."""
    long: bool = False
    """Runs only with -m "long or not long": it takes minutes, or a compiler."""
    quick: tuple[str, ...] = ()
    """Rivals in the comparison that CI runs on every push; without any, the case is not part of it."""

    @property
    def contenders(self) -> tuple[str, ...]:
        """Names of all, this library's first."""
        return (*self.own, *self.rivals)

    @property
    def name(self) -> str:
        """Operator, shape, dtype and variant."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return " ".join(filter(None, [self.operator, sizes, str(self.dtype).removeprefix("torch."), self.variant]))


class Outcome(NamedTuple):
    """Result of running a case, by contender."""

    records: dict[str, Record]
    samples: dict[str, list[float]]
    """Seconds for the case's whole shape."""
    refused: Mapping[str, str] = {}
    """Why contenders that ran have no record."""


DEFAULT_BUDGET = Budget()


def run_case(case: Case, budget: Budget = DEFAULT_BUDGET) -> Outcome:
    """Check and time all contenders of a case that run here.

    Raises:
        AssertionError: a contender's result is wrong; the time of a wrong result means nothing.
    """
    names = [name for name in case.contenders if case.unavailable(name) is None]
    prepared = case.prepare(names)
    running = {name: prepared.contenders[name] for name in names}
    with torch.inference_mode(not case.gradients):
        for name, contender in running.items():
            prepared.check(name, contender.call())
        taken = interleaved_samples({name: one.call for name, one in running.items()}, **budget._asdict())
        peaks = {name: peak_bytes(contender.call) for name, contender in running.items()}
    samples = {name: [seconds * running[name].factor for seconds in taken[name]] for name in running}
    records = _records(case, prepared, samples, peaks)
    del prepared, running
    # the next case may need the memory
    gc.collect()
    return Outcome(records, samples)


def run_until_quiet(case: Case, budget: Budget = DEFAULT_BUDGET) -> Outcome:
    """Run a case for a record: repeat it while a contender is noisy, then leave out those that stayed noisy.

    Raises:
        AssertionError: a contender's result is wrong.
    """
    outcome, refused = measure_until_quiet(lambda: run_case(case, budget), _noise_of)
    return _without_refused(case, outcome, refused) if refused else outcome


def _noise_of(outcome: Outcome) -> dict[str, str]:
    """Noisy contenders and why; if one is faster than its limit, the peaks are measured again first."""
    found, records = {}, outcome.records
    for products in {products_of(record) for record in records.values() if record["fraction_of_limit"] > 1}:
        best_peaks(products, remeasure=True)
    for name, record in records.items():
        records[name] = with_peaks(record, best_peaks(products_of(record)))
        if why := noise(record["spread"], records[name]["fraction_of_limit"]):
            found[name] = why
    return found


def _without_refused(case: Case, outcome: Outcome, refused: Mapping[str, str]) -> Outcome:
    """Outcome without the refused contenders; empty unless one of this library's and a rival are left."""
    kept = {name: record for name, record in outcome.records.items() if name not in refused}
    if not set(kept) & set(case.own) or not set(kept) & set(case.rivals):
        others = "; ".join(f"{name} was {why}" for name, why in refused.items())
        return Outcome({}, {}, dict.fromkeys(kept, f"refused: {others}") | dict(refused))
    for name, record in kept.items():
        ratios = {rival: ratio for rival, ratio in record["ratios"].items() if rival in kept}
        rival = case.rival if case.rival in ratios else min(ratios, key=ratios.__getitem__)
        kept[name] = {**record, "rival": rival, "ratio": ratios[rival], "ratios": ratios}
    return Outcome(kept, {name: outcome.samples[name] for name in kept}, refused)


def _records(
    case: Case, prepared: Prepared, samples: Mapping[str, list[float]], peaks_of: Mapping[str, int]
) -> dict[str, Record]:
    medians = {name: median(values) for name, values in samples.items()}
    rivals = {name: seconds for name, seconds in medians.items() if name in case.rivals}
    rival = case.rival if case.rival in rivals else min(rivals, key=rivals.__getitem__)
    dtype = str(case.dtype).removeprefix("torch.")
    records = {}
    for name, seconds in medians.items():
        contender = prepared.contenders[name]
        cost = contender.cost or prepared.cost
        peaks = best_peaks(contender.facts.get("products", dtype))
        values = (
            case.group,
            case.operator,
            case.variant,
            dict(case.shape),
            dtype,
            "cpu",
            name,
            name in case.own,
            seconds,
            spread(samples[name]),
            len(samples[name]),
            cost.bytes,
            cost.flops,
            cost.exps,
            cost.bound(peaks),
            cost.seconds(peaks) / seconds,
            peaks_of[name],
            rival,
            rivals[rival] / seconds,
            {other: time / seconds for other, time in rivals.items()},
            dict(contender.facts),
            *built_from().values(),
        )
        records[name] = dict(zip(RECORD_KEYS, values, strict=True))
    return records
