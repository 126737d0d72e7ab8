"""Token vectors of many texts without padding: the encoded texts of late interaction and DeFormer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixencoder.peers.token_states import TokenStates


@dataclass(frozen=True)
class PackedTokens:
    """A vector for every token of N texts; equal texts may share their vectors."""

    vectors: Tensor
    """(T, d), the token vectors of all texts."""
    starts: Tensor
    """(N,) int64, row of each text's first token."""
    lengths: Tensor
    """(N,) int64, number of tokens of each text."""

    @classmethod
    def from_texts(cls, texts: Sequence[Tensor]) -> "PackedTokens":
        """Pack texts, each (n, d), in the order given."""
        vectors = torch.cat(list(texts))
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64, device=vectors.device)
        return cls(vectors, lengths.cumsum(0) - lengths, lengths)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.lengths)

    def __getitem__(self, numbers: Tensor | slice) -> "PackedTokens":
        """Return chosen texts, in the order given, sharing the vectors."""
        return PackedTokens(self.vectors, self.starts[numbers], self.lengths[numbers])

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackedTokens":
        """Return the same on another device, in another dtype."""
        return PackedTokens(self.vectors.to(device, dtype), self.starts.to(device), self.lengths.to(device))

    def pad(self) -> TokenStates:
        """Return vectors (N, n, d) padded on the right to the longest text; padding repeats a text's last vector."""
        columns = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        rows = self.starts.unsqueeze(1) + columns.minimum(self.lengths.unsqueeze(1) - 1)
        return TokenStates(self.vectors[rows], columns < self.lengths.unsqueeze(1))
