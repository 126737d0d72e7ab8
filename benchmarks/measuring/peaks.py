"""Peak rates of the CPU, measured several times during a run.

On a shared or throttled machine a single measurement may find only half of a rate, and a fraction of such a limit would
exceed 1.
"""

from typing import Any

import torch

from benchmarks.measuring.timing import interleaved_samples
from mixencoder.ranking.linear import Linear, QuantisedLinear
from mixkernels.devices import measured_cpu_peaks, multiplies_natively
from mixkernels.roofline import Cost, Peaks

PRODUCTS = ("float32", "bfloat16", "int8")
"""Kinds of products; each has its own peaks."""

_best: dict[tuple[str, int], Peaks] = {}
"""By kind of products and number of threads."""


def best_peaks(products: str, *, remeasure: bool = False) -> Peaks:
    """Return the best rates measured so far at the current number of threads, each rate by itself.

    Args:
        products: one of `PRODUCTS`; those that the CPU emulates have float32's peaks.
        remeasure: measure once more first; takes half a second.
    """
    if products != "int8" and not multiplies_natively(getattr(torch, products)):
        products = "float32"
    key = products, torch.get_num_threads()
    if remeasure or key not in _best:
        found = _measure(products)
        _best[key] = Peaks(*map(max, found, _best.get(key, found)))
    return _best[key]


def _measure(products: str) -> Peaks:
    if products != "int8":
        return measured_cpu_peaks.__wrapped__(getattr(torch, products))
    size = 1024
    linear = QuantisedLinear(Linear(torch.randn(size, size), torch.zeros(size)))
    numbers, step = torch.randint(128, (size, size), dtype=torch.uint8), torch.ones(size, 1)
    samples = interleaved_samples({"product": lambda: linear.of_numbers(numbers, step, zero=0)}, seconds=0.2)
    # everything but linear layers is computed in float32
    others = best_peaks("float32")
    return others._replace(flops=max(others.flops, 2 * size**3 / min(samples["product"])))


def all_peaks() -> dict[str, dict[str, float]]:
    """The best peaks of every kind of products on this machine, as stored in a file of results."""
    here = (name for name in PRODUCTS if name != "int8" or torch.backends.mkldnn.is_available())
    return {name: best_peaks(name)._asdict() for name in here}


def products_of(record: dict[str, Any]) -> str:
    """Kind of products whose peaks limit a record: the case's dtype, or what its facts say."""
    return record["facts"].get("products", record["dtype"])


def with_peaks(record: dict[str, Any], peaks: Peaks) -> dict[str, Any]:
    """Return a record with bound and fraction of the limit computed from these peaks."""
    cost = Cost(record["flops"], record["bytes"], record["exps"])
    return {**record, "bound": cost.bound(peaks), "fraction_of_limit": cost.seconds(peaks) / record["seconds"]}
