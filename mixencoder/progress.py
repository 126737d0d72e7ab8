"""Progress bars: tqdm's if one is shown, otherwise an object that does nothing."""

import logging
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger("mixencoder")


class ProgressBar(Protocol):
    """The methods of a bar that the library calls."""

    def update(self, n: int = 1, /) -> object:
        """Advance by n units."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class NoProgress:
    """A bar that is not shown.

    Even a disabled bar of tqdm takes a lock that forked processes share. If one process were killed while it held the
    lock, the others would wait for ever.
    """

    def update(self, n: int = 1, /) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def progress_bar(total: int | None, name: str, unit: str, show: bool | None) -> ProgressBar:
    """Return a progress bar.

    Args:
        total: number of units, None if it is not known.
        name: the text before the bar.
        unit: what is counted, such as "text".
        show: whether the bar is shown; None shows it if the library's logger is at INFO or below.
    """
    if show is None:
        show = logger.getEffectiveLevel() <= logging.INFO
    if not show:
        return NoProgress()
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit)
