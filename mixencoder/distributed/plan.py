"""Which rows of which files make which shard of an index, and building one shard: a crash leaves it out or whole.

A shard is written into a hidden folder beside the others and renamed when it is complete, so every folder that is named
as a shard is a valid index of its own. Nothing here depends on what runs the plan.
"""

import fnmatch
import glob
import itertools
import json
import shutil
import tempfile
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.base.texts import printable
from mixencoder.data.candidates import iterate_candidates
from mixencoder.data.tables import file_format
from mixencoder.durable import replace_file, sync_files, sync_folder
from mixencoder.errors import DataError, DuplicateIdError, IndexStateError, MissingExtraError
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex, Listing
from mixencoder.index.messages import quoted_ids
from mixencoder.index.shard_list import LIST, PLAN, repeated_ids, write_list

_DRAFT = ".shard-"
"""Prefix of folders in which shards are being built."""
_SHOWN, _REMOVED_AT_ONCE = 5, 10_000


class Source(NamedTuple):
    """A file of candidates: its path or URI, its bytes, and its number of candidates."""

    path: str
    size: int
    rows: int


class Part(NamedTuple):
    """The rows `first` to `last` (exclusive) of a file, which make one shard."""

    name: str
    path: str
    first: int
    last: int


class Reading(NamedTuple):
    """How files are read, as in `mixencoder.data.candidates.iterate_candidates`."""

    column: str | None = None
    format: str | None = None


class Built(NamedTuple):
    """A finished shard: its name, its documents, and whether an earlier run had built it."""

    name: str
    documents: int
    held: bool


def find_sources(pattern: str) -> list[tuple[str, int]]:
    """Return the files that a path, a pattern with ``*``, or a URI names, in the order of their names, and their bytes.

    Args:
        pattern: local, or a URI such as s3://bucket/folder/*.parquet, which pyarrow reads.

    Raises:
        DataError: there is no such file.
        MissingExtraError: a URI is given and pyarrow is not installed.
    """
    if "://" in pattern:
        found = _find_remote(pattern)
    else:
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        found = [(name, Path(name).stat().st_size) for name in sorted(names) if Path(name).is_file()]
    if not found:
        raise DataError(f"no file is named {pattern}; expected a path, or a pattern such as 'texts/*.parquet'")
    return found


def count_rows(path: str, reading: Reading) -> int:
    """Return the number of candidates of a file.

    Raises:
        DataError: it cannot be read.
    """
    with _local_copy(path) as file:
        if file_format(file) == "parquet" and reading.format in (None, "parquet"):
            with suppress(ImportError, OSError, ValueError):
                from pyarrow import parquet

                return parquet.read_metadata(file).num_rows
        return sum(1 for _ in iterate_candidates(str(file), column=reading.column, format=reading.format))


def cut(sources: Sequence[Source], shard_rows: int) -> list[Part]:
    """Return the parts of files that make the shards, in order: at most `shard_rows` rows each, of one file each."""
    ranges = [
        (source.path, first, min(first + shard_rows, source.rows))
        for source in sources
        for first in range(0, source.rows, shard_rows)
    ]
    return [Part(f"shard-{number:06d}", *where) for number, where in enumerate(ranges)]


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Note in a folder what is built there, or check that an unfinished build of the same is continued.

    Args:
        folder: new or empty, or one that holds an unfinished build.
        plan: a JSON object.

    Raises:
        IndexStateError: the folder holds a complete index, other files, or an unfinished build of something else.
        OSError: it cannot be written.
    """
    plan = json.loads(json.dumps(plan))
    if (folder / LIST).exists():
        raise IndexStateError(f"{folder} holds a complete index; choose another folder, or delete it")
    note = folder / PLAN
    if note.exists():
        try:
            held = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IndexStateError(
                f"{note} cannot be read ({error}); delete the folder and build the index again"
            ) from error
        differing = [name for name in {**plan, **held} if plan.get(name) != held.get(name)]
        if differing:
            name = differing[0]
            raise IndexStateError(
                printable(
                    f"{folder} holds an unfinished build with {name} {str(held.get(name))[:300]}; expected "
                    f"{str(plan.get(name))[:300]}. Give the same files, model and options, or delete the folder"
                )
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = next((path.name for path in folder.iterdir()), None)
        if foreign is not None:
            raise IndexStateError(f"{folder} is not empty (it holds {printable(foreign)}); expected a new or empty one")
        replace_file(note, json.dumps(plan, indent=1) + "\n")
    for leftover in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def build_shard(engine: MixEncoder, folder: Path, part: Part, reading: Reading, options: dict[str, Any]) -> Built:
    """Encode the rows of one part into a complete index in the folder, unless that is there already.

    Args:
        engine: encodes.
        folder: of all shards.
        part: what to encode.
        reading: how the file is read.
        options: of `MixEncoder.index`.

    Raises:
        DataError: the file cannot be read, or holds fewer rows than before.
        DuplicateIdError: an id occurs twice in the part.
        IndexStorageError, OSError: the disk is full, read-only or failing.
    """
    target = folder / part.name
    if target.exists():
        return Built(part.name, _documents(target), held=True)
    draft = folder / f"{_DRAFT}{part.name}-{uuid.uuid4().hex[:8]}"
    try:
        with _local_copy(part.path) as file:
            rows = iterate_candidates(str(file), column=reading.column, format=reading.format)
            texts, ids = _columns(list(itertools.islice(rows, part.first, part.last)))
        if len(texts) != part.last - part.first:
            raise DataError(
                f"{part.path} holds {part.first + len(texts):,} candidates; expected more than {part.last - 1:,}, as "
                "when the build began. Delete the folder and build the index again"
            )
        # an iterator, as `mixencoder index build` gives: a text that occurs twice is one document
        given = None if ids is None else iter(ids)
        engine.index(iter(texts), given, draft, show_progress_bar=False, **options).close()
        sync_files(draft)
        try:
            draft.rename(target)
        except OSError:
            # a worker that was believed lost has finished the same shard
            if not target.exists():
                raise
        sync_folder(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Built(part.name, _documents(target), held=False)


def finish(folder: Path, names: Sequence[str]) -> int:
    """Make finished shards one index, and return its number of documents.

    A text without a given id that several shards hold stays in the first of them, as one index would hold it once.

    Args:
        folder: holds the shards.
        names: of the shards, in order.

    Raises:
        DuplicateIdError: two documents have the same given id; the message names the first of them, and their shards.
        OSError: the folder cannot be written.
    """
    with _open_all(folder, names) as listings:
        repeated: dict[int, list[str]] = {}
        wrong = []
        for id, numbers, given in repeated_ids(listings):
            if given:
                wrong.append((id, [names[number] for number in numbers]))
                if len(wrong) > _SHOWN:
                    break
            for number in numbers[1:]:
                repeated.setdefault(number, []).append(id)
    if wrong:
        where = ", ".join(dict.fromkeys(name for _, held in wrong[:_SHOWN] for name in held))
        raise DuplicateIdError(
            f"ids are given twice: {quoted_ids([id for id, _ in wrong[:_SHOWN]])}"
            f"{' and more' if len(wrong) > _SHOWN else ''} (in {where} of {folder}); expected ids that are unique over "
            "all files. Change the files, delete the folder, and build the index again"
        )
    for number, ids in repeated.items():
        with CandidateIndex.open(folder / names[number], None) as index:
            for first in range(0, len(ids), _REMOVED_AT_ONCE):
                index.remove(ids[first : first + _REMOVED_AT_ONCE])
    write_list(folder, names)
    (folder / PLAN).unlink(missing_ok=True)
    return sum(_documents(folder / name) for name in names)


def _columns(rows: list[tuple[str, str | None]]) -> tuple[list[str], list[str] | None]:
    texts, ids = [text for text, _ in rows], [id for _, id in rows if id is not None]
    return texts, ids or None


def _documents(path: Path) -> int:
    with CandidateIndex.open(path, None, read_only=True, check_sizes=False) as index:
        return len(index)


@contextmanager
def _open_all(folder: Path, names: Sequence[str]) -> Generator[list[Listing]]:
    indexes = [CandidateIndex.open(folder / name, None, read_only=True) for name in names]
    try:
        yield [index.listing() for index in indexes]
    finally:
        for index in indexes:
            index.close()


def _find_remote(pattern: str) -> list[tuple[str, int]]:
    fs = _arrow_fs()
    base = pattern[: pattern.index("*")].rpartition("/")[0] if "*" in pattern else pattern
    system, root = fs.FileSystem.from_uri(base)
    scheme = pattern[: len(base)][: -len(root)] if base.endswith(root) else base[: base.index("://") + 3]
    if "*" not in pattern:
        infos = [system.get_file_info(root)]
    else:
        infos = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == fs.FileType.File]
    named = sorted((scheme + info.path, info.size) for info in files)
    return [(name, size) for name, size in named if "*" not in pattern or fnmatch.fnmatch(name, pattern)]


def _arrow_fs() -> Any:
    try:
        from pyarrow import fs
    except ImportError as error:
        raise MissingExtraError(f"URIs need pyarrow: pip install 'mixencoder[parquet]' ({error})") from error
    return fs


@contextmanager
def _local_copy(path: str) -> Generator[Path]:
    """Yield a local file with the content of a path or URI."""
    if "://" not in path:
        yield Path(path)
        return
    system, inside = _arrow_fs().FileSystem.from_uri(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.rpartition("/")[2])
        try:
            with system.open_input_stream(inside) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        yield copy
