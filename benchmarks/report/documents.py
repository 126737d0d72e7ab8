"""Documents with marks, and what stands between them."""

import os
import re
from pathlib import Path

from benchmarks.measuring.provenance import ROOT
from benchmarks.report.pictures import PICTURES, picture_path
from benchmarks.report.tables import TABLES

_BEGIN = re.compile(r"<!-- ([a-z ]+) (table|picture): begin -->")


def documents() -> list[Path]:
    """All documents that have a mark."""
    found = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "mixencoder" / "pretrained" / "README.md",
    ]
    return [path for path in found if _BEGIN.search(path.read_text(encoding="utf-8"))]


def rendered(text: str, folder: Path) -> str:
    """Return a document's text with all that stands between marks made anew.

    Args:
        text: of the document.
        folder: that it lies in, for links.

    Raises:
        ValueError: a mark names nothing that there is, or has no end.
    """
    parts, place = [], 0
    for begin in _BEGIN.finditer(text):
        name, kind = begin.groups()
        end = f"<!-- {name} {kind}: end -->"
        stop = text.find(end, begin.end())
        if stop < 0:
            raise ValueError(f"{begin.group()} has no {end} behind it")
        parts += [text[place : begin.end()], "\n", _block(name, kind, folder), "\n"]
        place = stop
    return "".join([*parts, text[place:]])


def _block(name: str, kind: str, folder: Path) -> str:
    makers = TABLES if kind == "table" else PICTURES
    if name not in makers:
        raise ValueError(f"there is no {kind} {name!r}; expected one of {', '.join(makers)}")
    if kind == "table":
        return TABLES[name]()
    picture = PICTURES[name]()
    if picture is None:
        return "Not recorded yet."
    return f"![{picture.alt}]({Path(os.path.relpath(picture_path(name), folder)).as_posix()})"
