"""Raise if a forked child uses an index that its parent opened."""

import os

from mixencoder.errors import IndexStateError


def check_same_process(name: str, opened_by: int) -> None:
    """Raise if this is not the process that opened the index: SQLite and thread locks do not survive a fork.

    Args:
        name: of the index, for the message.
        opened_by: id of the process that opened it.

    Raises:
        IndexStateError: this is another process.
    """
    if os.getpid() != opened_by:
        raise IndexStateError(
            f"{name}: this index was opened in another process (pid {opened_by}); open it again here, in pid "
            f"{os.getpid()}. An index in memory has to be built here"
        )
