"""Tables of cells as Markdown, for documents that are rendered from records."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """A table of cells; the second row is the line under the head, of ``---``."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_line(rows: Rows) -> str:
    """A table whose first row is its head, the line under it added."""
    head, *body = rows
    return markdown([head, ["---"] * len(head), *body])
