"""Counts and warnings of texts that were cut or hold no token, without repeating a warning at every call."""

import sys
import threading
import warnings
from typing import Any

_LIBRARY_PACKAGES = ("mixencoder", "mixkernels", "torch", "contextlib")
"""Packages whose frames may lie between a user's line and a warning, torch's and contextlib's as decorators."""


class Notices:
    """Counts events by kind; warns at the first of a kind, and again whenever its count gains a digit.

    A service that ranks long texts all day thus gets a few warnings, not one per call. Safe to use from several
    threads. Copies, by `copy` or pickle, start with no counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        # digits of the count at the last warning
        self._warned_digits: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of events of each kind, such as "truncated documents"."""
        with self._lock:
            return dict(self._counts)

    def note(self, kind: str, count: int, message: str, category: type[Warning]) -> None:
        """Count events, and warn if it is time; the warning points at the line of the user's call.

        If warnings are turned into errors, every call raises: an error does not count as a warning given.

        Args:
            kind: what is counted.
            count: how many are new.
            message: about the new ones; from the second warning on the total is added.
            category: of the warning.
        """
        with self._lock:
            total = self._counts[kind] = self._counts.get(kind, 0) + count
            digits = len(str(total))
            warned = self._warned_digits.get(kind, 0)
            if digits <= warned:
                return
            self._warned_digits[kind] = digits
        if warned:
            message += f" ({total:,} {kind} so far; the next warning comes at {10**digits:,})"
        try:
            warnings.warn(message, category, stacklevel=_user_stacklevel())
        except Warning:
            with self._lock:
                self._warned_digits[kind] = warned
            raise


def _user_stacklevel() -> int:
    """Return the stacklevel, for a `warnings.warn` in the calling function, of the first frame outside the library."""
    level, frame = 0, sys._getframe(1)
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARY_PACKAGES:
            return level
        frame = frame.f_back
    return level
