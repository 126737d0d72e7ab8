"""Pack a score and an id into one integer, so that top-k selection and merging are exact, ties included.

Backends share this module; the Triton kernel packs by the same rule. The high 32 bits of a key hold the float32 score,
mapped to an integer of the same order; the low 32 bits hold LARGEST_ID - id. A larger key means a higher score or, at
equal scores, a lower id. No two candidates share a key, so every way to sort or merge keys gives the same result.

-0.0 equals 0.0. NaN, of either sign, is one value above +inf: a NaN score comes first, where it is noticed.
"""

import torch
from torch import Tensor

LARGEST_ID = 2**32 - 1
"""Ids run from 0 to this."""

EMPTY_KEY = -(2**63)
"""Below every key of a candidate."""

_NAN_BITS = 0x7FC00000
_LOW_31 = 0x7FFFFFFF


def pack_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Keys, int64, of float32 scores and int64 ids of shapes that broadcast against each other."""
    # + 0.0 turns -0.0 into 0.0
    bits = (scores + 0.0).view(torch.int32).masked_fill_(scores.isnan(), _NAN_BITS).to(torch.int64)
    # negative floats decrease as their bits increase
    ordered = torch.where(bits < 0, bits ^ _LOW_31, bits)
    return (ordered << 32) | (LARGEST_ID - ids)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 scores and int64 ids of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ _LOW_31, ordered).to(torch.int32)
    return bits.view(torch.float32), LARGEST_ID - (keys & LARGEST_ID)


def best_of(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and ids of the `count` largest keys of (..., n), best first; of all keys if there are fewer."""
    return unpack_keys(keys.topk(min(count, keys.shape[-1]), dim=-1, sorted=True).values)
