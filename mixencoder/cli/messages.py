"""Print to standard error: messages, every kind of warning once, and a notice on a terminal while a command loads."""

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
_notices: list[str] = []
"""Notices that are shown on the terminal now."""


def say(text: str) -> None:
    """Print a message on standard error, over a notice if one is shown."""
    _erase_notices()
    _errors.print(printable(text), markup=False)


def on_terminal() -> bool:
    """Return whether standard error is a terminal; it may also be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def escape_unencodable() -> None:
    r"""Write characters that standard output and error cannot encode as escapes (``\u2019``) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def notice(text: str) -> Generator[None]:
    """Show a line while something takes time, if standard error is a terminal."""
    if on_terminal():
        sys.stderr.write(text)
        sys.stderr.flush()
        _notices.append(text)
    try:
        yield
    finally:
        _erase_notices()


def _erase_notices() -> None:
    while _notices:
        # blanks, as not every terminal knows how to clear a line
        sys.stderr.write(f"\r{' ' * len(_notices.pop())}\r")
        sys.stderr.flush()


@contextmanager
def print_warnings() -> Generator[None]:
    """Print warnings, Python's and those of the project's loggers, on one line each, and each of them once.

    Warnings that begin with a count are printed at the end, with the sum of the counts.
    """
    printer = _WarningPrinter(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("mixencoder", "mixkernels")]
    with warnings.catch_warnings():
        if not sys.warnoptions:
            # Python's default shows a text once per line of code, which would lose counts
            warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, category, *_, **__: printer.show(message, category)
        for logger in loggers:
            logger.addHandler(printer)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(printer)
            printer.finish()


class _WarningPrinter(logging.Handler):
    """Prints warnings once: those without a count immediately, those with a count at the end."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._printed: set[str] = set()
        self._counts: dict[str, _Count] = {}
        self._has_located = False

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def show(self, message: Warning | str, category: type[Warning]) -> None:
        """Print a Python warning, instead of `warnings.showwarning`."""
        if issubclass(category, TokenlessWarning):
            self._has_located = True
        elif issubclass(category, EmptyTextWarning) and self._has_located:
            # the engine warns of the same texts, without file and line
            return
        self.add(str(message))

    def add(self, text: str) -> None:
        text = " ".join(text.split())
        if counted := _COUNTS.fullmatch(text):
            count, total, rest = counted.groups()
            # what follows a semicolon differs from call to call, such as the first text
            kind = f"{'of' if total else ''} {rest.partition(';')[0]}"
            before = self._counts.get(kind, _Count(0, 0, rest))
            self._counts[kind] = _Count(before.count + _number(count), before.total + _number(total), before.rest)
        elif text not in self._printed:
            self._printed.add(text)
            say(f"warning: {text}")

    def finish(self) -> None:
        for count, total, rest in self._counts.values():
            say(f"warning: {count:,} of {total:,} {rest}" if total else f"warning: {count:,} {rest}")


class _Count(NamedTuple):
    """The summed counts of warnings of one kind, and the words of the first."""

    count: int
    total: int
    rest: str


def _number(text: str | None) -> int:
    return int((text or "0").replace(",", ""))
