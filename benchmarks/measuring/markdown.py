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


def multiple(ratio: float) -> str:
    """Write a ratio with three digits, or as a whole number from 1,000 on."""
    return f"{ratio:,.0f}x" if ratio >= 999.5 else f"{ratio:.3g}x"
