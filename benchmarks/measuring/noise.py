"""Refuses noise: what a disturbed machine did to a measurement is measured again, and refused after three tries.

Everything that records times asks here: cases of the suite, the GPU's groups, and the measurements that stand alone.
"""

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import TypeVar

LARGEST_SPREAD = 0.65
"""Largest spread of a record. Of 184 records of a quiet machine half had less than 0.08, nine in ten less than 0.25;
the worst, of a file that is written, had 0.61."""

TRIES = 3
"""How often something is measured before it is refused."""

Measured = TypeVar("Measured")


class NoisyMeasurementError(RuntimeError):
    """A measurement stayed noisy, and has no figure."""


def spread(samples: list[float]) -> float:
    """Distance of the quartiles of samples over their median; 0 for one sample."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def noise(found: float, fraction: float = 0.0, *, largest: float = LARGEST_SPREAD) -> str | None:
    """Why a measurement says nothing, or None.

    Args:
        found: spread of its samples.
        fraction: of the limit; nothing is faster than its limit, so that above 1 the clock or the peaks are wrong.
        largest: spread that is allowed.
    """
    # NaN is within no bound
    if not fraction <= 1:
        return f"{fraction:.3g} of the limit, expected 1 at most"
    if not found <= largest:
        return f"a spread of {found:.2f}, expected {largest:g} at most"
    return None


def quietly(
    measure: Callable[[], Measured], noise_of: Callable[[Measured], Mapping[str, str]]
) -> tuple[Measured, dict[str, str]]:
    """Measure until nothing is noisy, `TRIES` times at most.

    Args:
        measure: takes all figures that belong together anew.
        noise_of: names of the noisy ones and why.

    Returns:
        The measurement with the fewest noisy figures, and why those are refused.
    """
    best = None
    for _ in range(TRIES):
        found = measure()
        noisy = noise_of(found)
        if best is None or len(noisy) < len(best[1]):
            best = found, noisy
        if not noisy:
            break
    found, noisy = best
    return found, {name: f"refused after {TRIES} tries on a noisy machine: {why}" for name, why in noisy.items()}


def quiet_medians(take: Callable[[], Mapping[str, list[float]]]) -> dict[str, float]:
    """Medians of `quiet_samples`."""
    return {name: median(values) for name, values in quiet_samples(take).items()}


def quiet_samples(take: Callable[[], Mapping[str, list[float]]]) -> Mapping[str, list[float]]:
    """Samples that belong together by name, taken again while some are noisy.

    Raises:
        NoisyMeasurementError: some stayed noisy; the message names them.
    """

    def noise_of(samples: Mapping[str, list[float]]) -> dict[str, str]:
        return {name: why for name, values in samples.items() if (why := noise(spread(values)))}

    samples, refused = quietly(take, noise_of)
    if refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise NoisyMeasurementError(f"{reasons}. Measure again when nothing else runs")
    return samples
