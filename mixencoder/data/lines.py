"""Read lines of text files (plain or gzipped), pipes and standard input; every error names file and line.

Files may be untrusted: a line of more than `LONGEST_LINE` bytes raises, so that a small gzip file cannot fill the
memory. gzip is recognised by its first bytes, not by the file's name.
"""

import codecs
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mixencoder.errors import DataError

LONGEST_LINE = 64 * 2**20
"""Most bytes of a line, and most characters of a table's field; a machine with 2 GB of memory can hold several."""
_BLOCK = 2**16
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (line number from 1, text without its line end) of a file or a named pipe.

    Lines end with ``\n`` or ``\r\n``; with ``\r`` if the beginning of the file has only these. What is appended to a
    file while it is read is not read.

    Raises:
        DataError: the file cannot be read, is not UTF-8, holds a NUL byte or a line longer than `LONGEST_LINE`.
    """
    try:
        file = path.open("rb", buffering=_BLOCK)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        yield from _read(file, str(path))


def read_stdin() -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of standard input.

    Raises:
        DataError: as `read_lines`, or standard input is closed.
    """
    if sys.stdin is None:
        raise DataError("standard input is closed; expected lines of text")
    yield from _read(sys.stdin.buffer, "standard input")


def _read(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        file, head = _peek(file)
        is_packed = head.startswith(b"\x1f\x8b")
        if is_packed:
            file, head = _peek(cast(BinaryIO, gzip.GzipFile(fileobj=file)))
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                raise DataError(
                    f"{name} is {encoding}; expected UTF-8: convert it, for example with iconv -f {encoding} -t UTF-8"
                )
        # the last byte may be half of a \r\n
        ends_with_returns = b"\r" in head[:-1] and b"\n" not in head
        lines = _up_to_returns(file) if ends_with_returns else _up_to_newlines(file, is_packed=is_packed)
        for raw in lines:
            number += 1
            if len(raw) > LONGEST_LINE:
                raise DataError(
                    f"{name}, line {number}: longer than {LONGEST_LINE // 2**20} MB; expected one record a line: split "
                    "the text, or write line ends"
                )
            yield number, _decode(raw, name, number)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read: {reason}, after line {number}") from error


def _peek(file: BinaryIO) -> tuple[BinaryIO, bytes]:
    """Return the file in a form that can peek, and its first bytes without consuming them."""
    if not hasattr(file, "peek"):
        file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file)))
    return file, cast(io.BufferedReader, file).peek(_BLOCK)


def _up_to_newlines(file: BinaryIO, *, is_packed: bool) -> Iterator[bytes]:
    size = 0 if is_packed else _size(file)
    left = size
    while raw := file.readline(LONGEST_LINE + 1):
        left -= len(raw)
        if size and left <= 0:
            if not raw.endswith(b"\n") and _size(file) != size:
                raise OSError("it is being written, and its last line is not whole")
            yield raw
            return
        yield raw


def _size(file: BinaryIO) -> int:
    """Return the size of a regular file; 0 for pipes and system files, whose size is unknown."""
    try:
        found = os.fstat(file.fileno())
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _up_to_returns(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while len(rest) <= LONGEST_LINE and (block := file.read(16 * _BLOCK)):
        # a \r at the end may be half of a \r\n
        pieces = (rest + block).splitlines(keepends=True)
        rest = pieces.pop()
        yield from pieces
    if rest:
        yield from rest.splitlines(keepends=True)


def _decode(raw: bytes, name: str, number: int) -> str:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); "
            "convert the file, for example with iconv"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{name}, line {number}: a NUL byte at column {text.index(chr(0)) + 1}; expected text in UTF-8 (UTF-16 and "
            "binary files hold such bytes)"
        )
    return text.rstrip("\r\n")
