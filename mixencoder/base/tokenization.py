"""From texts to token ids: cut by tokens, counted, safe across threads.

A fast tokenizer's own truncation and padding mutate shared state, so neither is used: texts are tokenised whole and
without special tokens, cut here, and given the special tokens that the tokenizer itself puts around a text.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixencoder.base.inputs import not_a_text
from mixencoder.base.notices import Notices
from mixencoder.base.texts import first_unicode_fault
from mixencoder.errors import CheckpointError, EmptyTextWarning, InputError, TruncationWarning


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
        on_empty: of `mixencoder.base.empty_texts.ON_EMPTY`.
        notices: told of texts that were cut or hold no token; None tells nobody.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation_side: str = "right"
    role: str = "document"
    on_empty: str = "special"
    notices: Notices | None = field(default_factory=Notices, repr=False, compare=False)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts; those longer than max_length are cut.

        Raises:
            InputError: as `windows`.
        """
        return [row for (row,) in self.windows(texts).rows]

    def quiet(self) -> Self:
        """Return the same that warns of nothing."""
        return dataclasses.replace(self, notices=None)

    def windows(self, texts: Sequence[str], *, on_overflow: str = "truncate", advice: str = "") -> Windows:
        """Tokenise texts; those longer than max_length are cut ("truncate"), split ("chunk") or refused ("error").

        Texts that were cut are warned of, and so are those without a token (`mixencoder.base.notices`).

        Args:
            texts: any number of them.
            on_overflow: see above.
            advice: ends the warning of texts that were cut.

        Raises:
            InputError: a text is not a string, no valid Unicode, too long and to be refused, or holds no token where
                that is refused or there are no special tokens to read instead; the message says which.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(not_a_text(text, f"{self.role} {index}"))
        if not texts:
            return Windows([], 0)
        if (fault := first_unicode_fault(texts)) is not None:
            raise InputError(f"{self.role} {fault[0]} {fault[1]}; replace or drop such characters")
        prefix, suffix = self._special_tokens()
        room = self.max_length - len(prefix) - len(suffix)
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows, empty, cut = [], [], 0
        for index, tokens in enumerate(encoded["input_ids"]):
            if not tokens:
                self._check_empty(f"{self.role} {index} holds no token: {_shown(texts[index])}", [*prefix, *suffix])
                empty.append(index)
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
        if self.notices is not None:
            self._tell(self.notices, texts, empty, cut, advice)
        return Windows(rows, cut)

    def _check_empty(self, found: str, special: list[int]) -> None:
        """Refuse a text without a token where that is wanted, or where nothing would be left to read."""
        if self.on_empty == "error":
            raise InputError(f"{found}; expected some text")
        if not special:
            raise InputError(f"{found}, and this tokenizer has no special tokens to read instead; expected some text")

    def _tell(self, notices: Notices, texts: Sequence[str], empty: list[int], cut: int, advice: str) -> None:
        plural = "queries" if self.role == "query" else "documents"
        if empty:
            notices.note(
                f"empty {plural}",
                len(empty),
                f"{len(empty):,} of {len(texts):,} {plural} hold no token and were read as special tokens alone; the "
                f"first is {self.role} {empty[0]}: {_shown(texts[empty[0]])}",
                EmptyTextWarning,
            )
        if cut:
            kept = "start" if self.truncation_side == "right" else "end"
            notices.note(
                f"truncated {plural}",
                cut,
                f"{cut:,} of {len(texts):,} {plural} are longer than {self.max_length} tokens; their {kept} was kept"
                + advice,
                TruncationWarning,
            )

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


def _shown(text: str, length: int = 40) -> str:
    """Return a text for a message, its start if it is long."""
    return repr(text) if len(text) <= length else f"{text[:length]!r}..."


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both (B, longest) int64, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
