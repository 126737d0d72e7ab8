"""What an engine tells its user without failing: a warning at the first occasion, a running count of all."""

import sys
import threading
import warnings
from typing import Any

_OWN = ("mixencoder", "mixkernels", "torch", "contextlib")
"""Packages that stand between a user's line and a warning; torch's decorators are among the frames."""


class Notices:
    """Warns of each kind of occasion once, and again whenever its count has gained a digit.

    A service that ranks long texts all day so gets a handful of lines, not one a call. Safe to use from several
    threads. A copy, by `copy` or by pickle, begins anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._said: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @property
    def counts(self) -> dict[str, int]:
        """How often there was something of each kind, by name, such as "truncated documents"."""
        with self._lock:
            return dict(self._counts)

    def note(self, kind: str, count: int, message: str, category: type[Warning]) -> None:
        """Count occasions, and warn if there is need; the warning points at the caller's own line.

        Where warnings are errors every call raises, as nothing has been said then.

        Args:
            kind: what is counted.
            count: how many more there are.
            message: of these; the running count is added from the second warning on.
            category: of the warning.
        """
        with self._lock:
            total = self._counts[kind] = self._counts.get(kind, 0) + count
            digits = len(str(total))
            said = self._said.get(kind, 0)
            if digits <= said:
                return
            self._said[kind] = digits
        if said:
            message += f" ({total:,} {kind} so far; every tenfold is told)"
        try:
            warnings.warn(message, category, stacklevel=_callers_level())
        except Warning:
            with self._lock:
                self._said[kind] = said
            raise


def _callers_level() -> int:
    """Return the stacklevel, as seen by who calls this, of the first frame outside the library."""
    level, frame = 0, sys._getframe(1)
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _OWN:
            return level
        frame = frame.f_back
    return level
