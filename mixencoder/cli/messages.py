"""What a command says on standard error: messages, warnings once each, a notice on a terminal while it loads."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console

from mixencoder.base.empty_texts import TokenlessWarning
from mixencoder.base.texts import printable
from mixencoder.errors import EmptyTextWarning

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_COUNTS = re.compile(r"(\d[\d,]*)(?: of (\d[\d,]*))? (.+)")
"""A warning that begins with what it counted: "12 of 20 documents are ..."."""
_standing: list[str] = []
"""The notice on the terminal, where there is one."""


def say(text: str) -> None:
    """Print a message on standard error, in the place of a notice if one stands there."""
    _take_back()
    _errors.print(printable(text), markup=False)


def on_terminal() -> bool:
    """Return whether standard error is a terminal; it may also be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def take_any_character() -> None:
    r"""Let what a stream's encoding cannot hold be written as ``\u2019``, where it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def notice(text: str) -> Generator[None]:
    """Show a line on a terminal while something takes its time, and nothing where standard error is no terminal."""
    if on_terminal():
        sys.stderr.write(text)
        sys.stderr.flush()
        _standing.append(text)
    try:
        yield
    finally:
        _take_back()


def _take_back() -> None:
    while _standing:
        # blanks, as not every terminal knows how to clear a line
        sys.stderr.write(f"\r{' ' * len(_standing.pop())}\r")
        sys.stderr.flush()


@contextmanager
def told_warnings() -> Generator[None]:
    """Say warnings, Python's and those of the project's loggers, in one line each and every kind once.

    Those that begin with a count wait for the end, and come once with the sum of the counts.
    """
    teller = _Teller(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("mixencoder", "mixkernels")]
    with warnings.catch_warnings():
        if not sys.warnoptions:
            # by default a text is shown once for a line of code, which would hide counts
            warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, category, *_, **__: teller.show(message, category)
        for logger in loggers:
            logger.addHandler(teller)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(teller)
            teller.finish()


class _Teller(logging.Handler):
    """Says warnings: those without a count at once and once, those with one at the end."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()
        self._counts: dict[str, _Count] = {}
        self._knows_places = False

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())

    def show(self, message: Warning | str, category: type[Warning]) -> None:
        """Take the place of `warnings.showwarning`."""
        if issubclass(category, TokenlessWarning):
            self._knows_places = True
        elif issubclass(category, EmptyTextWarning) and self._knows_places:
            # the engine's, of the same texts, knows neither file nor line
            return
        self.hear(str(message))

    def hear(self, text: str) -> None:
        text = " ".join(text.split())
        if counted := _COUNTS.fullmatch(text):
            count, total, rest = counted.groups()
            # behind a semicolon stands what differs from call to call, such as the first text
            kind = f"{'of' if total else ''} {rest.partition(';')[0]}"
            before = self._counts.get(kind, _Count(0, 0, rest))
            self._counts[kind] = _Count(before.count + _number(count), before.total + _number(total), before.rest)
        elif text not in self._said:
            self._said.add(text)
            say(f"warning: {text}")

    def finish(self) -> None:
        for count, total, rest in self._counts.values():
            say(f"warning: {count:,} of {total:,} {rest}" if total else f"warning: {count:,} {rest}")


class _Count(NamedTuple):
    """What warnings of one kind counted together, and the words of the first."""

    count: int
    total: int
    rest: str


def _number(text: str | None) -> int:
    return int((text or "0").replace(",", ""))
