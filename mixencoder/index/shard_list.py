"""The file ``shards.json``, which makes a folder of indexes one sharded index, and the search for shards by path.

    OUT/
      shards.json            kind, format (1), the shards in order: names in the folder, or paths
      shard-000000/          a complete index
      shard-000001/

Without that file, the folders inside that hold an index are the shards, in the order of their names.
"""

import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mixencoder.base.inputs import local_path
from mixencoder.base.texts import printable
from mixencoder.durable import replace_file
from mixencoder.errors import DuplicateIdError, IndexDamagedError, IndexStateError, InputError
from mixencoder.index.files import read_small
from mixencoder.index.folder import POINTER
from mixencoder.index.messages import quoted_ids
from mixencoder.index.view import Listing

LIST = "shards.json"
PLAN = "build.json"
"""Made by `mixencoder.distributed.ray_build`: what an unfinished build does."""
KIND, FORMAT = "mixencoder-sharded-index", 1
_MOST_BYTES = 2**24
_SHOWN = 5


def shard_paths(path: str | Path | Iterable[str | Path]) -> list[Path] | None:
    """Return the paths of the shards of a sharded index, or None if a path is that of a single index.

    Args:
        path: a folder that holds `LIST` or indexes, or a list of the paths of indexes.

    Raises:
        InputError: the list is empty, or names an index twice.
        IndexStateError: the folder is an unfinished build.
        IndexDamagedError: the list of shards in the folder cannot be read.
    """
    if not isinstance(path, str | Path):
        found = [local_path(part) for part in path]
        if not found:
            raise InputError("the list of paths is empty; expected the path of at least one index")
        check_distinct_paths(found)
        return found
    try:
        folder = local_path(path)
        if not str(path) or (folder / POINTER).exists():
            return None
        if (folder / LIST).exists():
            return read_list(folder)
        if (folder / PLAN).exists():
            raise IndexStateError(
                f"{folder} is unfinished: building it was interrupted; run the same command again, finished shards are "
                "not encoded again"
            )
        found = sorted(part.parent for part in folder.glob(f"[!.]*/{POINTER}"))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, IndexDamagedError | IndexStateError):
            raise
        # opening it as a single index says what is wrong
        return None
    return found or None


def check_distinct_paths(paths: Sequence[Path]) -> None:
    """Raise if two paths lead to one folder.

    Raises:
        InputError: two do; the message names them.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise InputError(f"{other} and {path} are the same index; expected each shard once")


def read_list(folder: Path) -> list[Path]:
    """Return the paths of the shards that a folder lists.

    Raises:
        IndexDamagedError: the list cannot be read.
        IndexStateError: its format is newer.
    """
    path = folder / LIST
    try:
        content = json.loads(read_small(path, _MOST_BYTES))
        kind, version, names = content["kind"], content["format"], content["shards"]
        if kind != KIND or type(version) is not int or version < 1:
            raise ValueError(f"kind {kind!r}, format {version!r}")
        if version <= FORMAT and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise ValueError("shards is not a list of names")
    except (IndexDamagedError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise IndexDamagedError(
            f"{path} cannot be read ({type(error).__name__}: {printable(str(error)[:200])}); expected the list of a "
            "sharded index's shards. Write it again with mixencoder index merge"
        ) from error
    if version > FORMAT:
        raise IndexStateError(
            f"{folder} has format {version}; this version of mixencoder reads up to {FORMAT}. Upgrade mixencoder"
        )
    return [folder / name for name in names]


def write_list(folder: Path, names: Sequence[str]) -> None:
    """Write the list of shards in one step, so that a crash leaves the folder without a list, or with the whole one.

    Args:
        folder: exists.
        names: of folders in it, or paths; in the order of their documents.

    Raises:
        OSError: it cannot be written.
    """
    content = {"kind": KIND, "format": FORMAT, "shards": list(names)}
    replace_file(folder / LIST, json.dumps(content, indent=1) + "\n")


def repeated_ids(listings: Sequence[Listing]) -> Iterator[tuple[str, list[int], bool]]:
    """Yield the ids that several listings hold, with the numbers of these, and whether the id was given in one of them.

    An id that was not given is a hash of the text, so the texts are equal. Reads all ids, in the memory of a few.
    """
    merged = heapq.merge(*(_numbered(listing, number) for number, listing in enumerate(listings)))
    for id, group in itertools.groupby(merged, key=lambda item: item[0]):
        held = list(group)
        if len(held) > 1:
            yield id, [number for _, number, _ in held], any(given for _, _, given in held)


def check_unique_ids(listings: Sequence[Listing], names: Sequence[str]) -> None:
    """Raise if two shards hold the same id.

    Raises:
        DuplicateIdError: some do; the message names the first of them, and their shards.
    """
    found = list(itertools.islice(repeated_ids(listings), _SHOWN + 1))
    if found:
        shown = quoted_ids([id for id, _, _ in found[:_SHOWN]])
        where = ", ".join(dict.fromkeys(names[number] for _, numbers, _ in found[:_SHOWN] for number in numbers))
        raise DuplicateIdError(
            f"several shards hold the ids {shown}{' and more' if len(found) > _SHOWN else ''} (in {where}); expected "
            "ids that are unique over all shards. Remove them from all shards but one (mixencoder index remove)"
        )


def _numbered(listing: Listing, number: int) -> Iterator[tuple[str, int, bool]]:
    for id, given in listing.sorted_ids():
        yield id, number, given
