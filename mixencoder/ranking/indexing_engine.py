"""`IndexingEngine`: the methods of `mixencoder.fast.MixEncoder` that make, open and read indexes and first stages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.inference_context import inference
from mixencoder.base.inputs import as_list, check_documents, local_path, positive_integer
from mixencoder.base.results import check_encoded
from mixencoder.errors import InputError
from mixencoder.first_stage import VectorIndex
from mixencoder.first_stage.libraries import Options
from mixencoder.first_stage.vector_index import FOLDER
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.index.candidate_index import BuildEstimate
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.dual_vectors import DualVectors, dual_vectors, pooled
from mixencoder.ranking.fingerprint import match_index
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.index_encoder import (
    DocumentEncoder,
    IndexAdapter,
    estimate_index,
    open_index,
    project_index,
    read_embeddings,
)


class IndexingEngine(EncodingEngine[QueryState, Tensor]):
    """An engine whose encoded documents can be stored in an index.

    Attributes:
        identity: the fingerprint of model and tokenizer that an index stores.
    """

    model: MixEncoderModel
    _derived = (*EncodingEngine._derived, "identity")

    def _derive(self) -> None:
        super()._derive()
        self.identity = ModelIdentity(self.model, self.tokenizer)

    def index(
        self,
        documents: Iterable[str] | None = None,
        ids: Iterable[str] | None = None,
        path: str | Path | None = None,
        *,
        precision: str = "float16",
        layout: str = "projected",
        on_overflow: str = "truncate",
        metadata: Iterable[Mapping[str, Any] | None] | None = None,
        embeddings: Tensor | np.ndarray | None = None,
        store_text: bool = True,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> CandidateIndex:
        """Encode documents once into an index that `rank` reads, in memory or in a folder.

        In a folder it is committed every 1,024 texts; after an interruption the same call continues from there.

        Texts that are cut or hold no token are counted and warned of (`notices`), here and when more are added.

        Args:
            documents: any number of texts; an iterator is read piece by piece.
            ids: a name for each; None takes a hash of the text, so that equal texts become one document.
            path: a new or empty folder, or an unfinished index; None keeps the index in memory.
            precision: "float32", "float16", "bfloat16" or "int8": how numbers are stored (docs/candidate-index.md).
            layout: "projected" stores everything that the first interaction layer can compute without a query;
                "compact" only the context embeddings, which takes less space and more time.
            on_overflow: "truncate" cuts documents that are longer than the model reads, "chunk" splits them and ranks
                each by its best part, "error" rejects them.
            metadata: a JSON object or None for each document, stored with it.
            embeddings: (N, k, d) from `encode_document`, used instead of encoding texts; with k = 1 also (N, d).
            store_text: store the texts, for `return_documents` and for repairing damage.
            batch_size, show_progress_bar: as in `encode_document`.

        Raises:
            InputError: an option or a text cannot be used.
            IndexStateError: path holds a complete index (use `open_index`) or other files.
            IndexMismatchError: the unfinished index at path is of another model or has other settings.
            DuplicateIdError: an id is given twice.
            IndexStorageError: the disk is full, read-only or failing.
            IndexLockedError: another process or thread is writing the index.
        """
        if documents is not None:
            check_documents(documents)
        batch_size = positive_integer(batch_size, "batch_size")
        index = IndexAdapter(self._document_encoder, precision, layout, on_overflow).create(path, store_text=store_text)
        progress = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        index.build(documents, ids, metadata=metadata, embeddings=embeddings, **progress)
        return index

    def open_index(
        self,
        path: str | Path | Iterable[str | Path],
        *,
        read_only: bool = False,
        check_sizes: bool = True,
        verify: bool = False,
    ) -> CandidateIndex:
        """Open an index that this model's encoder made with weights of this dtype; opening writes nothing.

        If the interaction has changed since, a "projected" index can be ranked, but not added to: see `project_index`.

        Args:
            path: its folder. A list of folders, or a folder of shards (docs/scale.md), is opened as one read-only
                index: a `mixencoder.index.ShardedIndex`.
            read_only: the index raises an error when written to.
            check_sizes: raise if files are too short; pass False to open such an index for `CandidateIndex.repair`.
            verify: also compare all stored data with checksums, which reads all of it.

        Raises:
            IndexMismatchError: it was made by another encoder or with other settings, or shards differ; the message
                names both.
            IndexStateError: there is no index, it is unfinished, or its format is newer.
            InputError: the list is empty or names a folder twice.
            IndexDamagedError: files are missing, cut short or unreadable, or, with verify, a checksum is wrong.
        """
        return open_index(self._document_encoder, path, read_only=read_only, check_sizes=check_sizes, verify=verify)

    def project_index(
        self,
        index: CandidateIndex,
        path: str | Path | None = None,
        *,
        precision: str | None = None,
        layout: str = "projected",
        show_progress_bar: bool | None = None,
    ) -> CandidateIndex:
        """Copy an index of this encoder with this model's projections, without encoding texts again.

        For a model whose interaction was trained further, or for another layout or precision. Ids, texts and metadata
        stay. Embeddings are taken as stored, in int8 or float16 rounded, and everything is computed from the
        rounded ones. After an interruption the same call continues.

        Args:
            index: in either layout; it stays as it is.
            path, layout: as in `index`.
            precision: None takes that of the index.
            show_progress_bar: as in `encode_document`.

        Raises:
            IndexMismatchError: another encoder made the index, or it stores no context embeddings.
            IndexDamagedError: a checksum of the index is wrong.
            InputError, IndexStateError, IndexStorageError, IndexLockedError: as `index`.
        """
        options = {"precision": precision, "layout": layout, "show_progress_bar": show_progress_bar}
        return project_index(self._document_encoder, index, path, **options)

    def estimate_index(
        self,
        documents: Iterable[str],
        *,
        precision: str = "float16",
        layout: str = "projected",
        on_overflow: str = "truncate",
        batch_size: int = 32,
    ) -> BuildEstimate:
        """Estimate the bytes and the time that an index of documents takes, by encoding a few of them.

        Raises:
            InputError: an option or a text cannot be used.
        """
        options = {"precision": precision, "layout": layout, "on_overflow": on_overflow, "batch_size": batch_size}
        return estimate_index(self._document_encoder, list(check_documents(documents)), **options)

    def read_embeddings(self, index: CandidateIndex | Snapshot, ids: Iterable[str]) -> Tensor:
        """Read the context embeddings of documents out of an index of this encoder: (n, k, d), on the CPU.

        Args:
            index: in any precision; numbers are those that it stores.
            ids: names of documents, in the order wanted.

        Raises:
            IndexMismatchError: another encoder made the index, or it stores no context embeddings.
            UnknownIdError: the index does not hold one of the ids.
            InputError: a document has several rows (on_overflow="chunk").
        """
        return read_embeddings(self._document_encoder, index, as_list(ids, "id"))

    def build_first_stage(
        self,
        index: CandidateIndex | Snapshot,
        path: str | Path | None = None,
        *,
        kind: str = "usearch",
        factory: str | None = None,
        precision: str | None = None,
        effort: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> VectorIndex:
        """Build a vector index of the dual term's vectors of all documents, for ``rank(..., first_stage=...)``.

        It serves this commit of the index: after a change, build it again.

        Args:
            index: single or sharded, of this model's encoder.
            path: a folder, which is replaced in one step. None takes the folder "first-stage" in that of the index; if
                the index has no folder, the result stays in memory.
            kind: "usearch" or "faiss"; each is an extra of the same name.
            factory: with "faiss": the string of its index factory, such as "IVF4096,PQ48"; None takes "HNSW32".
            precision: with "usearch": "float32", "float16" or "bfloat16"; None takes float16.
            effort: how much a search looks at: vectors kept in view in a graph (None: 256), or inverted lists read
                (None: the square root of their number). More is slower and finds more.
            show_progress_bar: as in `encode_document`.

        Raises:
            InputError: an option cannot be used, the index is empty, or the model has no dual term.
            IndexMismatchError: another encoder made the index.
            MissingExtraError: the library is not installed.
            IndexStorageError: the folder cannot be written.
        """
        view, folder = self._dual_view(index), _first_stage_folder(index, path)
        options = Options(factory, precision, effort)
        made = VectorIndex.build(view, pooled, kind, options, show_progress_bar=show_progress_bar)
        if folder is not None:
            made.save(folder)
        return made

    def open_first_stage(
        self, index: CandidateIndex | Snapshot, path: str | Path | None = None, *, verify: bool = True
    ) -> VectorIndex:
        """Open what `build_first_stage` made, for ranking this commit of the index.

        FAISS and usearch trust the files that they read: open only what you or somebody you trust has made.

        Args:
            index: as in `build_first_stage`.
            path: its folder; None takes the folder "first-stage" in that of the index.
            verify: compare the file's checksum, which reads all of it.

        Raises:
            IndexMismatchError: it is of another index, or the index has changed since; the message names both.
            IndexStateError: there is none.
            IndexDamagedError: a file is missing, changed or unreadable.
            MissingExtraError: the library is not installed.
            InputError: the index has no folder and path is None, or the model has no dual term.
        """
        view, folder = self._dual_view(index), _first_stage_folder(index, path)
        if folder is None:
            raise InputError("path is None, but the index has no folder; expected the folder of its first stage")
        found = VectorIndex.open(folder, verify=verify)
        found.check(view)
        return found

    def dual_vectors(self, index: CandidateIndex | Snapshot, *, size: int = 4096) -> Iterator[DualVectors]:
        """Read the vectors that the dual term compares out of an index, to fill a vector database with.

        Args:
            index: as in `build_first_stage`.
            size: most rows at once.

        Yields:
            Positions (R,) int64 and vectors (R, d) float32 of length 1, in order; a document of several rows
            (on_overflow="chunk") has several vectors.

        Raises:
            InputError: the model has no dual term.
            IndexMismatchError: another encoder made the index.
        """
        return dual_vectors(self._dual_view(index), positive_integer(size, "size"))

    @inference
    def encode_rows(self, rows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Tensor:
        """Encode documents given as token ids, special tokens included: (N, k, d).

        Raises:
            NonFiniteError: the model's result is NaN or infinite.
        """
        encoded = self._encode_documents(rows, positive_integer(batch_size, "batch_size"), show_progress_bar=False)
        return check_encoded(encoded, "documents", self.dtype)

    def _dual_view(self, index: CandidateIndex | Snapshot) -> Snapshot:
        """Return a view of an index whose dual vectors this model compares."""
        if not self.model.config.dual_term:
            raise InputError(
                "a first stage searches the vectors of the dual term, but this model has none (dual_term=False)"
            )
        view = index if isinstance(index, Snapshot) else index.snapshot()
        match_index(self.model, self.identity, view.manifest).check_ranking("the index")
        return view

    @property
    def _document_encoder(self) -> DocumentEncoder:
        return DocumentEncoder(self.model, self.identity, self.read_document, self.encode_rows)


def _first_stage_folder(index: CandidateIndex | Snapshot, path: str | Path | None) -> Path | None:
    """Return the folder of an index's first stage; None if neither path nor the index names one."""
    if path is not None:
        return local_path(path)
    held = index.path if isinstance(index, CandidateIndex) else None
    return None if held is None else held / FOLDER
