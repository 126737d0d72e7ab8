"""`VectorIndex`: a first stage that FAISS or usearch searches, built of an index's rows and kept in a folder.

    INDEX/
      first-stage/
        first_stage.json   kind, format (1), library and options, which documents, bytes and checksum of the other file
        vectors.bin        as the library writes it

The folder is replaced in one step (`mixencoder.durable`). A position of an index names another document after each
removal, so a first stage serves exactly the commit that it was built of.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mixencoder.base.inputs import positive_integer
from mixencoder.base.texts import printable
from mixencoder.durable import readable_folder, shared, write_folder
from mixencoder.errors import (
    IndexDamagedError,
    IndexMismatchError,
    IndexStateError,
    IndexStorageError,
    InputError,
)
from mixencoder.first_stage.libraries import Library, Options, library_of
from mixencoder.index import Snapshot
from mixencoder.index.files import read_small, status_of, storage_error, unreadable
from mixencoder.progress import progress_bar

FOLDER = "first-stage"
"""Name of the folder in that of an index."""
RECORD, VECTORS = "first_stage.json", "vectors.bin"
KIND, FORMAT = "mixencoder-first-stage", 1
_ROWS = 4096
"""Rows read at once."""
_RECORD_BYTES, _BLOCK_BYTES = 2**20, 2**24
_AGAIN = "Build it again: mixencoder index first-stage INDEX, or model.build_first_stage(index)"
_COMPARED = ("encoder", "weights", "tokenizer", "dtype")
"""Parts of an index's fingerprint that say which model made its vectors."""

Pooled = Callable[[Mapping[str, Tensor]], np.ndarray]
"""Returns the vectors (R, d) float32 of the dual term, of length 1, out of the fields of R rows."""


@dataclass(frozen=True)
class Built:
    """What a vector index was built of.

    Attributes:
        library: "usearch" or "faiss".
        options: of the library, as a JSON object.
        dimension: width of the vectors.
        documents, rows: of the index; a document may have several rows.
        commit: `Listing.digest` of the index.
        fingerprint: of the index.
    """

    library: str
    options: dict[str, Any]
    dimension: int
    documents: int
    rows: int
    commit: str
    fingerprint: dict[str, str]


class VectorIndex:
    """A first stage over a vector index of one commit of an index. Safe to use from several threads.

    Made by `MixEncoder.build_first_stage` and `MixEncoder.open_first_stage`.

    Attributes:
        built: what it was built of.
        path: the folder, or None in memory.
    """

    def __init__(self, library: Library, built: Built, path: Path | None = None) -> None:
        self.built, self.path = built, path
        self._library = library

    @classmethod
    def build(
        cls,
        view: Snapshot,
        pooled: Pooled,
        kind: str,
        options: Options,
        *,
        show_progress_bar: bool | None = None,
    ) -> "VectorIndex":
        """Build one of all rows of an index, in memory.

        Args:
            view: the documents.
            pooled: returns the vectors of rows.
            kind: "usearch" or "faiss".
            options: of the library.
            show_progress_bar: as in `CandidateIndex.add`.

        Raises:
            InputError: kind or an option cannot be used, the library cannot be trained, or the index is empty.
            MissingExtraError: the library is not installed.
        """
        library = library_of(kind)
        if options.effort is not None:
            options = options._replace(effort=positive_integer(options.effort, "effort"))
        if not len(view):
            raise InputError("the index holds no document; add some before you build its first stage")
        dimension = pooled(view.gather([0]).fields).shape[1]
        made = library.make(options, dimension, repeats=view.rows > len(view))

        def sample(count: int) -> np.ndarray:
            # evenly spread, as documents may be sorted
            positions = np.arange(min(count, len(view))) * len(view) // min(count, len(view))
            parts = range(0, len(positions), _ROWS)
            return np.concatenate([pooled(view.gather(positions[first : first + _ROWS]).fields) for first in parts])

        with progress_bar(view.rows, "First stage", "row", show_progress_bar) as bar:
            made.train(sample)
            for chunk in view.chunks(_ROWS):
                made.add(chunk.positions, pooled(chunk.fields))
                bar.update(len(chunk.positions))
        built = Built(
            kind, options._asdict(), dimension, len(view), view.rows, view.digest(), dict(view.manifest.fingerprint)
        )
        return cls(made, built)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "VectorIndex":
        """Open one that `save` wrote.

        FAISS and usearch trust the files that they read: open only files that you or somebody you trust has made.

        Args:
            path: its folder.
            verify: compare the file's checksum, which reads all of it. A damaged file may end the process.

        Raises:
            IndexStateError: there is none, or its format is newer.
            IndexDamagedError: a file is missing, changed or no regular file.
            IndexStorageError: a file cannot be read.
            MissingExtraError: the library is not installed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise _absent(folder)
        try:
            with shared(folder):
                return cls._open(folder, readable_folder(folder), verify=verify)
        except (IndexDamagedError, IndexStateError, IndexStorageError):
            raise
        except OSError as error:
            raise unreadable(error, folder) from error

    @classmethod
    def _open(cls, folder: Path, readable: Path, *, verify: bool) -> "VectorIndex":
        if status_of(readable / RECORD) is None:
            raise _absent(folder)
        built, size, crc = _read_record(readable / RECORD)
        file = readable / VECTORS
        found = status_of(file)
        if found is None or found.st_size != size:
            what = "is missing" if found is None else f"has {found.st_size:,} bytes; expected {size:,}"
            raise IndexDamagedError(f"{file} {what}. {_AGAIN}")
        if verify and _checksum(file) != crc:
            raise IndexDamagedError(f"{file} is not what was written (checksum). {_AGAIN}")
        library = library_of(built.library).load(file, Options(**built.options))
        if library.size() != (built.rows, built.dimension):
            rows, dimension = library.size()
            raise IndexDamagedError(
                f"{file} holds {rows:,} vectors of width {dimension}; expected {built.rows:,} of width "
                f"{built.dimension}. {_AGAIN}"
            )
        return cls(library, built, folder)

    def save(self, path: str | Path) -> None:
        """Write it to a folder in one step: a crash leaves what was there before, or all of this.

        Raises:
            IndexStorageError: the folder cannot be written.
        """
        folder = Path(path)

        def write(draft: Path) -> None:
            self._library.save(draft / VECTORS)
            size, crc = (draft / VECTORS).stat().st_size, _checksum(draft / VECTORS)
            content = {"kind": KIND, "format": FORMAT, **asdict(self.built), "bytes": size, "crc32": crc}
            (draft / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

        try:
            # drafts then lie inside the folder, where the next call deletes what a crash has left
            folder.mkdir(parents=True, exist_ok=True)
            write_folder(folder, write)
        except OSError as error:
            raise storage_error(error, folder) from error
        self.path = folder

    def check(self, view: Snapshot) -> None:
        """Raise if this does not serve a view of an index.

        Raises:
            IndexMismatchError: it was built of another index, or of another commit of it.
        """
        built, manifest = self.built, view.manifest
        where = "the first stage" + ("" if self.path is None else f" in {self.path}")
        found, expected = built.fingerprint, manifest.fingerprint
        parts = [part for part in _COMPARED if found.get(part) != expected.get(part)]
        if parts:
            differ = "; ".join(f"{part} is {found.get(part)}, expected {expected.get(part)}" for part in parts)
            raise IndexMismatchError(
                printable(
                    f"{where} was built of an index made by {found.get('name', 'another model')}, but this index was "
                    f"made by {expected.get('name', 'another one')}: {differ}. {_AGAIN}"
                )
            )
        if built.commit != view.digest():
            raise IndexMismatchError(
                f"{where} is out of date: it was built of {built.documents:,} documents at commit {built.commit[:8]}; "
                f"expected the {len(view):,} documents at commit {view.digest()[:8]} of this index. {_AGAIN}"
            )

    def search(self, vectors: np.ndarray, count: int) -> list[np.ndarray]:
        """As `FirstStage.search`: for each query at most count distinct positions, best first.

        Of a document with several rows the best one counts; more rows are then searched until there are enough
        documents.

        Raises:
            InputError: vectors have another width.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.built.dimension:
            raise InputError(f"vectors are {vectors.shape}; expected (queries, {self.built.dimension})")
        count = min(positive_integer(count, "count"), self.built.documents)
        wanted = math.ceil(count * self.built.rows / self.built.documents)
        while True:
            rows = [found[found >= 0] for found in self._library.search(vectors, wanted)]
            chosen = [_distinct(found)[:count] for found in rows]
            # a query for which fewer rows were found than wanted gets no more of them
            short = any(len(some) < count and len(found) == wanted for some, found in zip(chosen, rows, strict=True))
            if not short or wanted >= self.built.rows:
                return chosen
            wanted = min(2 * wanted, self.built.rows)

    def info(self) -> dict[str, Any]:
        """Return what it was built of, and the bytes of its file, as a JSON object."""
        size = None if self.path is None else (readable_folder(self.path) / VECTORS).stat().st_size
        return {"path": None if self.path is None else str(self.path), **asdict(self.built), "bytes": size}


def _distinct(positions: np.ndarray) -> np.ndarray:
    """Return the distinct positions in the order of their first occurrence."""
    _, first = np.unique(positions, return_index=True)
    return positions[np.sort(first)]


def _absent(folder: Path) -> IndexStateError:
    return IndexStateError(f"{folder} holds no first stage. Build one: mixencoder index first-stage INDEX")


def _read_record(path: Path) -> tuple[Built, int, int]:
    """Return what a vector index was built of, and the bytes and the checksum of its file."""
    try:
        content = json.loads(read_small(path, _RECORD_BYTES))
        kind, version = content.pop("kind"), content.pop("format")
        if kind != KIND or type(version) is not int or version < 1:
            raise ValueError(f"kind {kind!r}, format {version!r}")
        if version > FORMAT:
            raise IndexStateError(
                f"{path.parent} has format {version}; this version of mixencoder reads up to {FORMAT}. Upgrade "
                "mixencoder"
            )
        size, crc = content.pop("bytes"), content.pop("crc32")
        built = Built(**content)
        numbers = (size, crc, built.dimension, built.documents, built.rows)
        texts = (built.library, built.commit, *built.fingerprint.values())
        if not (all(type(number) is int for number in numbers) and 0 < built.documents <= built.rows):
            raise ValueError("a number is not one")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is not one")
        Options(**built.options)
    except IndexStateError:
        raise
    except (AttributeError, IndexDamagedError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise IndexDamagedError(
            f"{path} cannot be read ({type(error).__name__}: {printable(str(error)[:200])}). {_AGAIN}"
        ) from error
    return built, size, crc


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
