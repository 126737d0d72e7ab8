"""How error messages quote ids."""


def quoted_ids(ids: list[str], limit: int = 5) -> str:
    """Return the first `limit` ids in quotes, and how many more there are."""
    more = f" and {len(ids) - limit:,} more" if len(ids) > limit else ""
    return ", ".join(map(repr, ids[:limit])) + more
