"""Ids as error messages name them."""


def naming(ids: list[str], most: int = 5) -> str:
    """Return ids as an error message names them: the first few, and how many more."""
    more = f" and {len(ids) - most:,} more" if len(ids) > most else ""
    return ", ".join(map(repr, ids[:most])) + more
