"""Errors of a candidate index: what was found, what was expected, and the way out."""

import os

from mixencoder.errors import MixEncoderError


class IndexStateError(MixEncoderError, ValueError):
    """The index cannot be used like this: no index there, unfinished, closed, read-only, or of a newer format."""


class IndexMismatchError(MixEncoderError, ValueError):
    """The index was made by another model, tokenizer or settings; the message names both and what differs."""


class IndexDamagedError(MixEncoderError, ValueError):
    """A file of the index is not what was committed; the message names the file."""


class IndexLockedError(MixEncoderError, OSError):
    """Another writer is at work on the index."""


class IndexStorageError(MixEncoderError, OSError):
    """The disk refused: full, read-only or failing. What was committed before is intact."""


class UnknownIdError(MixEncoderError, ValueError):
    """Ids that the index does not hold; the message names them."""


class DuplicateIdError(MixEncoderError, ValueError):
    """Ids that are held already or given twice; the message names them."""


def naming(ids: list[str], most: int = 5) -> str:
    """Return ids as an error message names them: the first few, and how many more."""
    more = f" and {len(ids) - most:,} more" if len(ids) > most else ""
    return ", ".join(map(repr, ids[:most])) + more


def check_process(name: str, process: int) -> None:
    """Refuse to go on in a child that was forked: SQLite and the locks of threads do not survive that.

    Args:
        name: of the index, for the message.
        process: who opened it.

    Raises:
        IndexStateError: this is another process.
    """
    if os.getpid() != process:
        raise IndexStateError(
            f"{name}: this index was opened in another process (pid {process}); open it again here, in pid "
            f"{os.getpid()}. One in memory has to be built here"
        )
