"""What the CPU can do at best, looked at again and again during a run.

On a shared or throttled machine a single look finds up to half of it, and a fraction of such a limit would pass 1.
"""

from typing import Any

import torch

from mixkernels.devices import measured_cpu_peaks, multiplies_natively
from mixkernels.roofline import Cost, Peaks

_best: dict[torch.dtype, Peaks] = {}


def best_peaks(dtype: torch.dtype, *, look_again: bool = False) -> Peaks:
    """The best of all looks so far, number by number.

    Args:
        dtype: of products; one that the CPU emulates has float32's peaks.
        look_again: measure once more first, in half a second.
    """
    dtype = dtype if multiplies_natively(dtype) else torch.float32
    if look_again or dtype not in _best:
        found = measured_cpu_peaks.__wrapped__(dtype)
        _best[dtype] = Peaks(*map(max, found, _best.get(dtype, found)))
    return _best[dtype]


def with_peaks(record: dict[str, Any], peaks: Peaks) -> dict[str, Any]:
    """Return a record with the limit that these peaks set."""
    cost = Cost(record["flops"], record["bytes"], record["exps"])
    return {**record, "bound": cost.bound(peaks), "fraction_of_limit": cost.seconds(peaks) / record["seconds"]}
