"""Which process opened an index: a fork of it may not go on using it."""

import os

from mixencoder.errors import IndexStateError


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
