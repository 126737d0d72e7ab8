"""Scores and ids packed into one integer, so that the best of many can be taken and merged exactly, ties included.

A primitive of the backends; the Triton kernel packs by the same rule. The high 32 bits are the float32 score under a
map that keeps its order as an integer, the low 32 bits the id counted from the top: the larger key is the higher score
and, among equal scores, the lower id. No two candidates share a key, so every way to sort or merge keys agrees.

-0.0 equals 0.0. NaN, of either sign, is one value above +inf: a NaN score comes out first, where it is seen, instead of
being ranked in silence.
"""

import torch
from torch import Tensor

LARGEST_ID = 2**32 - 1
"""Ids are 0 to this."""

EMPTY_KEY = -(2**63)
"""Below every key of a candidate."""

_NAN_BITS = 0x7FC00000
_LOW_31 = 0x7FFFFFFF


def pack_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Keys, int64, of float32 scores and int64 ids of shapes that broadcast against each other."""
    # + 0.0 turns -0.0 into 0.0
    bits = (scores + 0.0).view(torch.int32).masked_fill_(scores.isnan(), _NAN_BITS).to(torch.int64)
    # negative floats fall as their bits rise
    ordered = torch.where(bits < 0, bits ^ _LOW_31, bits)
    return (ordered << 32) | (LARGEST_ID - ids)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 scores and int64 ids of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ _LOW_31, ordered).to(torch.int32)
    return bits.view(torch.float32), LARGEST_ID - (keys & LARGEST_ID)


def best_of(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and ids, best first, of the `count` largest of keys (..., n), of all if there are fewer."""
    return unpack_keys(keys.topk(min(count, keys.shape[-1]), dim=-1, sorted=True).values)
