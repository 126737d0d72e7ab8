"""FAISS and usearch behind one interface: vectors with the positions of their documents, searched by inner product.

Both libraries are optional, and imported when the first vector index is made or opened.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from mixencoder.errors import IndexDamagedError, InputError, MissingExtraError

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Precision -> usearch's name of it."""
_EFFORT = 256
"""Vectors that a search in an HNSW graph keeps in view, unless another number is given."""
_CONSTRUCTION = 128
"""The same while a vector is added to the graph."""
_TRAINED_ON, _TRAINED_ON_PER_LIST = 2**16, 64
"""Least number of vectors that FAISS is trained on, and the number for each inverted list."""


class Options(NamedTuple):
    """How a vector index is built and searched.

    Attributes:
        factory: FAISS: the string of its index factory, such as "IVF4096,PQ48"; None: "HNSW32".
        precision: usearch: how it stores numbers, one of `PRECISIONS`; None: float16.
        effort: how much a search looks at: vectors kept in view in an HNSW graph (None: 256), or inverted lists read
            by FAISS's IVF (None: the square root of their number).
    """

    factory: str | None = None
    precision: str | None = None
    effort: int | None = None


class Library(ABC):
    """A vector index of one library.

    Attributes:
        kind: name of the library in options and files.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def module(cls) -> Any:
        """Import the library and return its module.

        Raises:
            MissingExtraError: it is not installed.
        """

    @classmethod
    @abstractmethod
    def make(cls, options: Options, dimension: int, *, repeats: bool) -> "Library":
        """Make an empty index; repeats says whether a position may have several vectors.

        Raises:
            InputError: an option cannot be used.
            MissingExtraError: the library is not installed.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path, options: Options) -> "Library":
        """Open a file that `save` wrote.

        Raises:
            IndexDamagedError: the library cannot read it.
            MissingExtraError: the library is not installed.
        """

    def train(self, sample: Callable[[int], np.ndarray]) -> None:
        """Train on a sample of the vectors if the index needs that; sample(n) returns at most n of them."""
        return

    @abstractmethod
    def add(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors (n, d) float32 of documents at positions (n,) int64."""

    @abstractmethod
    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """Return the positions of the best vectors, (Q, count) int64, best first; -1 where there are no more."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the index to a file."""

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Return the number of vectors, and their width."""


class Faiss(Library):
    """Any index of FAISS's factory."""

    kind = "faiss"

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self._index = faiss, index

    @classmethod
    def module(cls) -> Any:
        """As `Library.module`."""
        try:
            import faiss
        except ImportError as error:
            raise _missing(cls.kind, error) from error
        return faiss

    @classmethod
    def make(cls, options: Options, dimension: int, *, repeats: bool) -> "Faiss":
        """As `Library.make`."""
        faiss = cls.module()
        if options.precision is not None:
            raise InputError(
                f'precision is {options.precision!r}; FAISS takes none: name it in factory, such as "HNSW32,SQfp16"'
            )
        factory = options.factory or "HNSW32"
        try:
            index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
            graph, lists = _graph_of(faiss, index), _lists_of(faiss, index)
            if graph is not None:
                graph.efConstruction = _CONSTRUCTION
            if lists is not None:
                effort = options.effort or max(1, round(math.sqrt(lists.nlist)))
                faiss.ParameterSpace().set_index_parameter(index, "nprobe", effort)
            elif graph is not None:
                graph.efSearch = options.effort or _EFFORT
            elif options.effort is not None:
                raise InputError(f"effort is {options.effort}, but {factory} has neither a graph nor inverted lists")
        except RuntimeError as error:
            raise InputError(f"factory is {factory!r}, which FAISS cannot make: {_last_line(error)}") from error
        wrapped = repeats and not isinstance(index, faiss.IndexIDMap)
        return cls(faiss, faiss.IndexIDMap(index) if wrapped else index)

    @classmethod
    def load(cls, path: Path, options: Options) -> "Faiss":
        """As `Library.load`; the file holds the effort."""
        faiss = cls.module()
        try:
            return cls(faiss, faiss.read_index(str(path)))
        except RuntimeError as error:
            raise IndexDamagedError(f"FAISS cannot read {path}: {_last_line(error)}") from error

    def train(self, sample: Callable[[int], np.ndarray]) -> None:
        """As `Library.train`."""
        if self._index.is_trained:
            return
        lists = _lists_of(self._faiss, self._index)
        wanted = max(_TRAINED_ON, _TRAINED_ON_PER_LIST * (0 if lists is None else lists.nlist))
        vectors = sample(wanted)
        try:
            self._index.train(vectors)
        except RuntimeError as error:
            raise InputError(
                f"FAISS cannot train this index on {len(vectors):,} vectors: {_last_line(error)}. Choose a factory "
                "with fewer lists, or none that is trained, such as HNSW32"
            ) from error

    def add(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        """As `Library.add`; without repeated positions they count from 0."""
        if isinstance(self._index, self._faiss.IndexIDMap):
            self._index.add_with_ids(vectors, positions)
        else:
            self._index.add(vectors)

    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """As `Library.search`."""
        return self._index.search(vectors, count)[1]

    def save(self, path: Path) -> None:
        """As `Library.save`."""
        try:
            self._faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OSError(_last_line(error)) from error

    def size(self) -> tuple[int, int]:
        """As `Library.size`."""
        return self._index.ntotal, self._index.d


class Usearch(Library):
    """An HNSW graph of usearch."""

    kind = "usearch"

    def __init__(self, index: Any, options: Options) -> None:
        self._index = index
        self._index.expansion_search = options.effort or _EFFORT
        # the library has a fixed number of contexts for searches
        self._mutex = threading.Lock()

    @classmethod
    def module(cls) -> Any:
        """As `Library.module`."""
        try:
            import usearch.index
        except ImportError as error:
            raise _missing(cls.kind, error) from error
        return usearch.index

    @classmethod
    def make(cls, options: Options, dimension: int, *, repeats: bool) -> "Usearch":
        """As `Library.make`."""
        usearch = cls.module()
        if options.factory is not None:
            raise InputError(f"factory is {options.factory!r}, which is for FAISS; usearch builds an HNSW graph")
        precision = options.precision or "float16"
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        index = usearch.Index(
            ndim=dimension, metric="ip", dtype=PRECISIONS[precision], expansion_add=_CONSTRUCTION, multi=repeats
        )
        return cls(index, options)

    @classmethod
    def load(cls, path: Path, options: Options) -> "Usearch":
        """As `Library.load`; the file is mapped into memory."""
        usearch = cls.module()
        try:
            index = usearch.Index.restore(str(path), view=True)
        except (RuntimeError, ValueError) as error:
            raise IndexDamagedError(f"usearch cannot read {path}: {_last_line(error)}") from error
        if index is None:
            raise IndexDamagedError(f"usearch cannot read {path}: it holds no index of usearch")
        return cls(index, options)

    def add(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        """As `Library.add`."""
        self._index.add(positions.astype(np.uint64), vectors, threads=torch.get_num_threads())

    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """As `Library.search`."""
        found = np.full((len(vectors), count), -1, dtype=np.int64)
        count = min(count, len(self._index))
        if count == 0:
            return found
        with self._mutex:
            matches = self._index.search(vectors, count, threads=min(len(vectors), torch.get_num_threads()))
        keys = np.atleast_2d(matches.keys).astype(np.int64)
        counts = np.atleast_1d(getattr(matches, "counts", keys.shape[1]))
        held = np.arange(keys.shape[1]) < counts[:, None]
        found[:, : keys.shape[1]][held] = keys[held]
        return found

    def save(self, path: Path) -> None:
        """As `Library.save`."""
        try:
            self._index.save(str(path))
        except RuntimeError as error:
            raise OSError(_last_line(error)) from error

    def size(self) -> tuple[int, int]:
        """As `Library.size`."""
        return len(self._index), self._index.ndim


LIBRARIES: dict[str, type[Library]] = {library.kind: library for library in (Usearch, Faiss)}


def library_of(kind: str) -> type[Library]:
    """Return a library by name, if it is installed.

    Raises:
        InputError: there is no such library.
        MissingExtraError: it is not installed.
    """
    if kind not in LIBRARIES:
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(LIBRARIES)}")
    LIBRARIES[kind].module()
    return LIBRARIES[kind]


def _missing(kind: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(f"a first stage by {kind} needs the extra: pip install 'mixencoder[{kind}]' ({error})")


def _graph_of(faiss: Any, index: Any) -> Any:
    """Return the HNSW graph of an index, or None."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        return _graph_of(faiss, index.index)
    return _graph_of(faiss, index.base_index) if isinstance(index, faiss.IndexRefine) else getattr(index, "hnsw", None)


def _lists_of(faiss: Any, index: Any) -> Any:
    """Return the inverted lists of an index, or None."""
    if isinstance(index, faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
