"""Reading what a caller wants to add: texts, ids, metadata and embeddings, checked, and named by content if need be."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.storage.errors import DuplicateIdError, naming
from mixencoder.storage.schema import raw_bytes

_DIGEST_BYTES = 16


class Document(NamedTuple):
    """A document to be added.

    Attributes:
        number: its place in what was given.
        id: its name.
        given: whether the caller named it; else the id is a hash of its content.
        digest: hash of its content; None where the id is that hash.
        text: or None.
        metadata: as JSON, or None.
        embedding: taken instead of encoding the text, or None.
    """

    number: int
    id: str
    given: bool
    digest: bytes | None
    text: str | None
    metadata: str | None
    embedding: Tensor | None


def read_documents(
    documents: Iterable[str] | None,
    ids: Iterable[str] | str | None,
    metadata: Iterable[Mapping[str, Any] | None] | None,
    embeddings: Tensor | np.ndarray | None,
) -> list[Document] | Iterator[Document]:
    """Return documents: a list, checked whole, for sequences and embeddings, else an iterator that checks as it goes.

    Raises:
        InputError: nothing to add is given, a value cannot be used, or the numbers of values differ.
        DuplicateIdError: an id is given twice in a list.
    """
    if isinstance(documents, str):
        documents = [documents]
    if documents is None and embeddings is None:
        raise InputError("neither documents nor embeddings are given; expected texts, embeddings, or both")
    if isinstance(documents, bytes) or not isinstance(documents, Iterable | None):
        raise InputError(f"documents is a {type(documents).__name__}; expected texts")
    streamed = documents is not None and not isinstance(documents, Sequence)
    if embeddings is not None:
        embeddings = torch.as_tensor(embeddings)
        if embeddings.dim() < 2:
            raise InputError(f"embeddings are {tuple(embeddings.shape)}; expected (N, ...)")
    columns = {
        "documents": documents,
        "ids": [ids] if isinstance(ids, str) else ids,
        "metadata": metadata,
        "embeddings": embeddings,
    }
    rows = _rows({name: column for name, column in columns.items() if column is not None})
    read = (_document(number, row) for number, row in enumerate(rows))
    if streamed:
        return read
    listed = list(read)
    check_distinct(listed)
    return listed


def check_distinct(documents: Sequence[Document]) -> None:
    """Refuse given ids that appear twice.

    Raises:
        DuplicateIdError: one does; the message names all.
    """
    seen: set[str] = set()
    twice = [item.id for item in documents if item.given and (item.id in seen or seen.add(item.id))]
    if twice:
        raise DuplicateIdError(f"ids are given twice: {naming(list(dict.fromkeys(twice)))}; expected distinct ids")


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Cut documents into lists of a size, the last one shorter."""
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _rows(columns: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    counts = {name: len(column) for name, column in columns.items() if isinstance(column, Sized)}
    if len(set(counts.values())) > 1:
        raise InputError(f"numbers differ: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    missing = object()
    for number, values in enumerate(itertools.zip_longest(*columns.values(), fillvalue=missing)):
        ended = [name for name, value in zip(columns, values, strict=True) if value is missing]
        if ended:
            raise InputError(f"{' and '.join(ended)} ended after {number}, but there is more of the others")
        yield dict(zip(columns, values, strict=True))


def _document(number: int, row: Mapping[str, Any]) -> Document:
    text, embedding = row.get("documents"), row.get("embeddings")
    if "documents" in row:
        content = _encoded(text, f"document {number}")
    else:
        content = raw_bytes(row["embeddings"].detach().cpu().contiguous())
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES)
    id = row.get("ids", digest.hexdigest())
    if not _encoded(id, f"id {number}"):
        raise InputError(f"id {number} is empty; expected a name")
    named_by_content = id == digest.hexdigest()
    metadata = row.get("metadata")
    return Document(
        number,
        id,
        "ids" in row,
        None if named_by_content else digest.digest(),
        text,
        None if metadata is None else _json(metadata, number),
        embedding,
    )


def _encoded(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"{name} is {text!r} ({type(text).__name__}); expected a string")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode: {error}") from error


def _json(metadata: Any, number: int) -> str:
    if not isinstance(metadata, Mapping):
        raise InputError(
            f"metadata {number} is {metadata!r} ({type(metadata).__name__}); expected a JSON object or None"
        )
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata {number} is not JSON: {error}") from error
