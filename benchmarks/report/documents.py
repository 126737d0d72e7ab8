"""Find documents with marks, and render the text between the marks."""

import os
import re
from pathlib import Path

from benchmarks.measuring.provenance import ROOT
from benchmarks.report.pictures import PICTURES, RECORDED_BY, picture_path
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
    """Return a document's text with the text between marks rendered again.

    Args:
        text: of the document.
        folder: of the document, for links.

    Raises:
        ValueError: a mark names an unknown table or picture, or has no end mark.
    """
    parts, position = [], 0
    for begin in _BEGIN.finditer(text):
        name, kind = begin.groups()
        end = f"<!-- {name} {kind}: end -->"
        stop = text.find(end, begin.end())
        if stop < 0:
            raise ValueError(f"{begin.group()} has no {end} after it")
        parts += [text[position : begin.end()], "\n", _block(name, kind, folder), "\n"]
        position = stop
    return "".join([*parts, text[position:]])


def _block(name: str, kind: str, folder: Path) -> str:
    makers = TABLES if kind == "table" else PICTURES
    if name not in makers:
        raise ValueError(f"there is no {kind} {name!r}; expected one of {', '.join(makers)}")
    if kind == "table":
        return TABLES[name]()
    picture = PICTURES[name]()
    if picture is None:
        return f"Not recorded yet: `{RECORDED_BY[name]}` does it." if name in RECORDED_BY else "Not recorded yet."
    return f"![{picture.alt}]({Path(os.path.relpath(picture_path(name), folder)).as_posix()})"
