"""Whether a tokenizer that was loaded can read at all, and fits the encoder beside it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mixencoder.errors import CheckpointError

_PROBES = 64
_WORDS = ("the", "in", "water", "2", "la", "de", "и", "的")
_MARKS = ("##", "Ġ", "▁", "</w>")
"""What vocabularies put before or behind a piece of a word."""


def check_tokenizer(tokenizer: Any, encoder: PreTrainedConfig | None, name: str | Path) -> None:
    """Check that a tokenizer knows some words, and that the encoder has an embedding for all of its tokens.

    transformers makes a tokenizer without words where the file that holds them is missing, and reads every text as
    unknown.

    Args:
        tokenizer: just loaded.
        encoder: configuration of the encoder that reads its tokens, None for any.
        name: the checkpoint's, for messages.

    Raises:
        CheckpointError: it knows none, or it has more tokens than the encoder.
    """
    size = len(tokenizer)
    if size <= len(tokenizer.all_special_ids):
        raise CheckpointError(
            f"the tokenizer in {name} has no vocabulary, only {size} special tokens; expected tokenizer.json, or the "
            "vocabulary file of its kind, beside config.json"
        )
    if not _knows_words(tokenizer, size):
        raise CheckpointError(
            f"the tokenizer in {name} reads every word as unknown ({tokenizer.unk_token}), those of its own vocabulary "
            "too; expected the files of one tokenizer"
        )
    last = max([size, *(number + 1 for number in tokenizer.added_tokens_decoder)])
    if encoder is not None and last > encoder.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {name} has {last:,} tokens, but the encoder has embeddings for {encoder.vocab_size:,}; "
            "after tokens are added, call resize_token_embeddings and save both"
        )


def _knows_words(tokenizer: Any, size: int) -> bool:
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return True
    pieces = tokenizer.convert_ids_to_tokens(list(range(0, size, -(-size // _PROBES))))
    texts = [*_WORDS]
    for piece in pieces:
        for mark in _MARKS:
            piece = (piece or "").replace(mark, "")
        texts.append(piece)
    special = set(tokenizer.all_special_ids)
    rows = tokenizer([text for text in texts if text], add_special_tokens=False, verbose=False)["input_ids"]
    return any(token not in special for row in rows for token in row)
