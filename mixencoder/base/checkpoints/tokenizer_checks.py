"""Check that a loaded tokenizer has a usable vocabulary and fits its encoder."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mixencoder.errors import CheckpointError

_PROBES = 64
"""Number of entries of the vocabulary to test."""
_WORDS = ("the", "in", "water", "2", "la", "de", "и", "的")
_MARKS = ("##", "Ġ", "▁", "</w>")
"""Marks that vocabularies add before or after a part of a word."""


def check_tokenizer(tokenizer: Any, encoder: PreTrainedConfig | None, name: str | Path) -> None:
    """Check that a tokenizer knows some words, and that the encoder has embeddings for all of its tokens.

    If the vocabulary file is missing, transformers makes a tokenizer without words, which reads every text as unknown.

    Args:
        tokenizer: of the checkpoint.
        encoder: configuration of the encoder; None skips the check of its embeddings.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: it knows no word, or it has more tokens than the encoder.
    """
    size = len(tokenizer)
    if size <= len(tokenizer.all_special_ids):
        raise CheckpointError(
            f"the tokenizer in {name} has no vocabulary, only {size} special tokens; expected tokenizer.json, or the "
            "vocabulary file of its kind, beside config.json"
        )
    if not _knows_words(tokenizer, size):
        raise CheckpointError(
            f"the tokenizer in {name} reads every word as unknown ({tokenizer.unk_token}), even words of its own "
            "vocabulary; expected files that belong to one tokenizer"
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
