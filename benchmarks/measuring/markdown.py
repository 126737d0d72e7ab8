"""Markdown tables, for documents that are rendered from records."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """Format rows of cells as a table; the second row is the line of ``---`` under the header."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown_table(rows: Rows) -> str:
    """Format rows of cells as a table; the first row is the header, and the line under it is added."""
    header, *body = rows
    return markdown([header, ["---"] * len(header), *body])
