"""How candidates are cut into pieces and scored on a CPU or a GPU."""

from typing import NamedTuple

import torch

from mixencoder.ranking.cuda_graphs import graphs_allowed

PIECE = 512
"""Candidates of a full piece on a CPU: enough for products to run at full speed, few enough to fit into its cache."""
_SHORTEST_PADDED = 16


class Plan(NamedTuple):
    """How candidates are cut into pieces and scored."""

    piece: int
    """Candidates of a full piece."""
    granule: int
    """Candidates of the smallest piece."""
    replayed: bool
    """Pieces are scored by replaying CUDA graphs (`mixencoder.ranking.cuda_graphs`). Queries are padded to a few
    lengths, as each length needs graphs of its own."""
    staged: bool
    """Rows in CPU memory are copied to the device through pinned memory (`mixencoder.ranking.pinned_memory`)."""


ON_CPU = Plan(PIECE, 32, replayed=False, staged=False)
ON_CPU_HALF = ON_CPU._replace(piece=2 * PIECE)
"""For bfloat16 and float16, with half the bytes a candidate: fewer calls between the products, which take less time."""
ON_GPU = Plan(4096, 512, replayed=True, staged=True)
"""With 4096 candidates, the FFN's intermediate results fit into the cache of a large GPU. Not yet timed on one."""


def plan_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Plan:
    """Return the plan for a device and the dtype of its products."""
    if device.type == "cpu":
        return ON_CPU if dtype.itemsize >= 4 else ON_CPU_HALF
    return ON_GPU._replace(replayed=device.type == "cuda" and graphs_allowed(), staged=device.type == "cuda")


def padded_length(length: int) -> int:
    """Return the length that a query of `length` tokens is padded to for CUDA graphs: a power of two, at least 16."""
    return max(_SHORTEST_PADDED, 1 << (length - 1).bit_length())
