"""Repeat noisy measurements, and refuse to record those that are still noisy after three tries.

Everything that records times uses it: the suite, the GPU benchmark, and the measurements outside the suite.
"""

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import TypeVar

LARGEST_SPREAD = 0.65
"""Largest spread of a record. Of 184 records on a quiet machine half had less than 0.08, nine in ten less than 0.25;
the worst, of writing a file, had 0.61."""

TRIES = 3
"""How often a measurement is made before it is refused."""

Measured = TypeVar("Measured")


class NoisyMeasurementError(RuntimeError):
    """A measurement stayed noisy, so there is no figure to record."""


def spread(samples: list[float]) -> float:
    """Distance of the quartiles of samples divided by their median; 0 for one sample."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def noise(found: float, fraction: float = 0.0, *, largest: float = LARGEST_SPREAD) -> str | None:
    """Return why a measurement is too noisy to record, or None.

    Args:
        found: spread of its samples.
        fraction: of the limit; nothing is faster than its limit, so above 1 the clock or the peaks are wrong.
        largest: largest spread that is allowed.
    """
    # written so that NaN counts as noise
    if not fraction <= 1:
        return f"{fraction:.3g} of the limit, expected 1 at most"
    if not found <= largest:
        return f"a spread of {found:.2f}, expected {largest:g} at most"
    return None


def measure_until_quiet(
    measure: Callable[[], Measured], noise_of: Callable[[Measured], Mapping[str, str]]
) -> tuple[Measured, dict[str, str]]:
    """Measure until nothing is noisy, `TRIES` times at most.

    Args:
        measure: measures all figures that belong together.
        noise_of: returns the names of the noisy figures and why.

    Returns:
        The measurement with the fewest noisy figures, and the reasons against these figures.
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
    """Take samples by name, all again while some are noisy.

    Raises:
        NoisyMeasurementError: some stayed noisy; the message names them.
    """

    def noise_of(samples: Mapping[str, list[float]]) -> dict[str, str]:
        return {name: why for name, values in samples.items() if (why := noise(spread(values)))}

    samples, refused = measure_until_quiet(take, noise_of)
    if refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise NoisyMeasurementError(f"{reasons}. Measure again when nothing else runs")
    return samples
