"""How candidates are cut into pieces on a kind of device."""

from typing import NamedTuple

import torch

from mixencoder.ranking.cuda_graphs import replays_wanted

PIECE = 512
"""Candidates of a full piece on a CPU: enough for products to run at full speed, few enough for a shared cache."""
_SHORTEST = 16


class Plan(NamedTuple):
    """How candidates are cut and scored on a kind of device."""

    piece: int
    """Candidates of a full piece."""
    granule: int
    """Candidates of the smallest piece."""
    replayed: bool
    """Pieces are scored by replaying CUDA graphs (`mixencoder.ranking.cuda_graphs`), with queries padded to a few
    lengths."""
    staged: bool
    """Rows in the memory of the CPU travel through pinned memory (`mixencoder.ranking.pinned_memory`)."""


ON_CPU = Plan(PIECE, 32, replayed=False, staged=False)
ON_GPU = Plan(4096, 512, replayed=True, staged=True)
"""The FFN's intermediates of a piece fit into the cache of a large GPU; no size has been timed on one yet."""


def plan_for(device: torch.device) -> Plan:
    """Return the plan for a device."""
    if device.type == "cpu":
        return ON_CPU
    return ON_GPU._replace(replayed=device.type == "cuda" and replays_wanted(), staged=device.type == "cuda")


def padded_length(length: int) -> int:
    """Return the length that a query of so many tokens is padded to for replays: a power of two, at least 16."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())
