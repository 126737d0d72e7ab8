"""From texts to token ids: cut by tokens, counted, safe across threads.

A fast tokenizer's own truncation and padding mutate shared state, so neither is used: texts are tokenised whole and
without special tokens, cut here, and given the special tokens that the tokenizer itself puts around a text.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixencoder.errors import CheckpointError, InputError, TruncationWarning


class Windows(NamedTuple):
    """Token rows of texts, several for a text that was split."""

    rows: list[list[list[int]]]
    """For every text its rows, at least one."""
    cut: int
    """Texts that lost tokens."""


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts of one role (queries or documents) into lists of token ids, special tokens included.

    Args:
        tokenizer: any transformers tokenizer.
        max_length: tokens kept of a text, special tokens included.
        truncation_side: "right" keeps the start of a text, "left" its end.
        role: "query" or "document", for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation_side: str = "right"
    role: str = "document"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts; those longer than max_length are cut, and the count is warned of once a call.

        Raises:
            InputError: a text is not a string or holds no token; the message says which.
        """
        windows = self.windows(texts)
        rows, cut = [row for (row,) in windows.rows], windows.cut
        if cut:
            kept = "start" if self.truncation_side == "right" else "end"
            plural = "queries" if self.role == "query" else "documents"
            warnings.warn(
                f"{cut} of {len(rows)} {plural} are longer than {self.max_length} tokens; their {kept} was kept",
                TruncationWarning,
                stacklevel=3,
            )
        return rows

    def windows(self, texts: Sequence[str], *, on_overflow: str = "truncate") -> Windows:
        """Tokenise texts; those longer than max_length are cut ("truncate"), split ("chunk") or refused ("error").

        Raises:
            InputError: a text is not a string, holds no token, or is too long and to be refused; the message says
                which.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{self.role} {index} is a {type(text).__name__}; expected a string")
        if not texts:
            return Windows([], 0)
        prefix, suffix = self._special_tokens()
        room = self.max_length - len(prefix) - len(suffix)
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows, cut = [], 0
        for index, tokens in enumerate(encoded["input_ids"]):
            if not tokens:
                raise InputError(f"{self.role} {index} holds no token: {texts[index]!r}; expected some text")
            parts = [tokens]
            if len(tokens) > room and on_overflow == "error":
                raise InputError(
                    f"{self.role} {index} has {len(tokens)} tokens; expected at most {room} (on_overflow: truncate or "
                    "chunk take longer ones)"
                )
            if len(tokens) > room and on_overflow == "chunk":
                parts = [tokens[start : start + room] for start in range(0, len(tokens), room)]
            elif len(tokens) > room:
                cut += 1
                parts = [tokens[:room] if self.truncation_side == "right" else tokens[-room:]]
            rows.append([[*prefix, *part, *suffix] for part in parts])
        return Windows(rows, cut)

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return what the tokenizer puts before and after a text."""
        probe = "a"
        bare = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(probe)["input_ids"]
        start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
        if not bare or start is None:
            raise CheckpointError(
                "the tokenizer does not put its special tokens around a text: without them "
                f"{probe!r} is {bare}, with them {whole}"
            )
        return whole[:start], whole[start + len(bare) :]


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both (B, longest) int64, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
