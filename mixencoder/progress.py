"""Progress bars: tqdm's where one is shown, nothing at all where none is."""

import logging
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger("mixencoder")


class ProgressBar(Protocol):
    """What the library asks of a bar."""

    def update(self, n: int = 1, /) -> object:
        """Move on by so many units."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class NoProgress:
    """A bar that is not shown.

    tqdm's own, even a disabled one, takes a lock that a process shares with those that it forked. One that was killed
    while holding it would leave the others waiting for ever.
    """

    def update(self, n: int = 1, /) -> None:
        """Pass over so many units."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def progress_bar(total: int | None, name: str, unit: str, show: bool | None) -> ProgressBar:
    """Return a progress bar; None shows it if the library's logger is at INFO or below.

    Args:
        total: number of units, None if it is not known.
        name: stands before the bar.
        unit: what is counted.
        show: whether it is shown.
    """
    if show is None:
        show = logger.getEffectiveLevel() <= logging.INFO
    if not show:
        return NoProgress()
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit)
