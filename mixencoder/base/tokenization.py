"""Turn texts into token ids, cut or split at a limit; safe to use from several threads.

Truncation and padding of fast tokenizers change shared state, so they are not used: texts are tokenised whole and
without special tokens, cut here, and surrounded with the special tokens that the tokenizer would add.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixencoder.base.inputs import not_a_text_message
from mixencoder.base.notices import Notices
from mixencoder.base.texts import first_unicode_fault
from mixencoder.errors import CheckpointError, EmptyTextWarning, InputError, TruncationWarning


class Windows(NamedTuple):
    """Token rows of texts; a text that was split has several."""

    rows: list[list[list[int]]]
    """The rows of each text, at least one."""
    cut: int
    """Number of texts that lost tokens."""


class TokenisedText(NamedTuple):
    """A text as a model reads it; the lists have one entry per token, special tokens included."""

    ids: list[int]
    spans: list[tuple[int, int] | None]
    """Start and end, in characters of the text; None for special tokens, and with a tokenizer that does not tell."""
    words: list[int | None]
    """The number of the word that a token is part of; None for special tokens."""


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts of one role (queries or documents) into lists of token ids, special tokens included.

    Args:
        tokenizer: any transformers tokenizer.
        max_length: most tokens of a row, special tokens included.
        truncation_side: "right" keeps the start of a text, "left" its end.
        role: "query" or "document", for messages.
        on_empty: one of `mixencoder.base.empty_texts.ON_EMPTY`.
        notices: counts texts that were cut or hold no token, and warns of them; None does neither.
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

    def locate(self, text: str) -> TokenisedText:
        """Tokenise a text as `__call__` does, and say where in the text its tokens are.

        Raises:
            InputError: as `windows`.
        """
        (row,) = self([text])
        prefix, suffix = ([None] * len(tokens) for tokens in self.special_tokens())
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=self.tokenizer.is_fast
        )
        total, kept = len(encoded["input_ids"]), len(row) - len(prefix) - len(suffix)
        numbers = range(kept) if self.truncation_side == "right" else range(total - kept, total)
        if not self.tokenizer.is_fast:
            return TokenisedText(row, [None] * len(row), [*prefix, *numbers, *suffix])
        spans, words = encoded["offset_mapping"], encoded.word_ids()
        return TokenisedText(
            row,
            [*prefix, *(tuple(spans[number]) for number in numbers), *suffix],
            [*prefix, *(words[number] for number in numbers), *suffix],
        )

    def quiet(self) -> Self:
        """Return a copy that gives no warnings."""
        return dataclasses.replace(self, notices=None)

    def windows(self, texts: Sequence[str], *, on_overflow: str = "truncate", advice: str = "") -> Windows:
        """Tokenise texts; those longer than max_length are cut ("truncate"), split ("chunk") or rejected ("error").

        Texts that were cut or hold no token give a warning (`mixencoder.base.notices`).

        Args:
            texts: any number of texts.
            on_overflow: see above.
            advice: added to the warning about texts that were cut.

        Raises:
            InputError: a text is not a string or not valid Unicode; is too long, with on_overflow "error"; or holds no
                token, with on_empty "error" or a tokenizer without special tokens. The message says which text.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(not_a_text_message(text, f"{self.role} {index}"))
        if not texts:
            return Windows([], 0)
        if (fault := first_unicode_fault(texts)) is not None:
            raise InputError(f"{self.role} {fault[0]} {fault[1]}; replace or drop such characters")
        prefix, suffix = self.special_tokens()
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
            self._note(self.notices, texts, empty, cut, advice)
        return Windows(rows, cut)

    def _check_empty(self, found: str, special: list[int]) -> None:
        """Raise for a text without a token if on_empty is "error" or the tokenizer has no special tokens."""
        if self.on_empty == "error":
            raise InputError(f"{found}; expected some text")
        if not special:
            raise InputError(f"{found}, and this tokenizer has no special tokens to read instead; expected some text")

    def _note(self, notices: Notices, texts: Sequence[str], empty: list[int], cut: int, advice: str) -> None:
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

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer adds before and after a text."""
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
    """Return a text, or the start of a long one, quoted for a message."""
    return repr(text) if len(text) <= length else f"{text[:length]!r}..."


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both (B, longest) int64, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
