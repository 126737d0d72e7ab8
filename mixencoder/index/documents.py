"""Reading the documents to add: checks texts, ids, metadata and embeddings, and makes ids where none are given."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.texts import unicode_fault
from mixencoder.errors import DuplicateIdError, InputError
from mixencoder.index.messages import quoted_ids
from mixencoder.index.schema import raw_bytes

_DIGEST_BYTES = 16
_MAX_DEPTH = 64
_CHECKED_ROWS = 4096
_NOT_LISTS = (bytes, bytearray, memoryview, str, set, frozenset)
"""Iterable types that are no list of documents, ids or metadata."""


class Document(NamedTuple):
    """A document to be added.

    Attributes:
        number: its position among the documents of the call.
        id: its id.
        given: whether the caller gave the id; otherwise it is a hash of the content.
        digest: hash of its content; None if the id is that hash.
        text: its text, or None.
        metadata: as JSON, or None.
        embedding: used instead of encoding the text, or None.
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
    """Return a checked list if documents is a sequence or None, else an iterator that checks each one as it is read.

    Raises:
        InputError: neither documents nor embeddings are given, a value cannot be used, or the numbers of values differ.
        DuplicateIdError: an id is given twice in a list.
    """
    if documents is None and embeddings is None:
        raise InputError("neither documents nor embeddings are given; expected texts, embeddings, or both")
    if isinstance(ids, str):
        # a string is one id, for one document, and not a list of letters
        if documents is not None and not isinstance(documents, str):
            raise InputError(f"ids is the string {ids!r:.60}; expected a list of strings, one a document")
        ids = [ids]
    if isinstance(documents, str):
        documents = [documents]
    streamed = documents is not None and not isinstance(documents, Sequence)
    columns: dict[str, Iterable[Any] | None] = {"documents": documents, "ids": ids, "metadata": metadata}
    for name, column in columns.items():
        _check_column(column, name)
    columns["embeddings"] = None if embeddings is None else read_embeddings(embeddings)
    rows = _zipped({name: column for name, column in columns.items() if column is not None})
    read = (_document(number, row) for number, row in enumerate(rows))
    if streamed:
        return read
    listed = list(read)
    check_distinct(listed)
    return listed


def check_distinct(documents: Sequence[Document]) -> None:
    """Raise if a given id appears twice.

    Raises:
        DuplicateIdError: some do; the message names them.
    """
    seen: set[str] = set()
    twice = [item.id for item in documents if item.given and (item.id in seen or seen.add(item.id))]
    if twice:
        raise DuplicateIdError(f"ids are given twice: {quoted_ids(list(dict.fromkeys(twice)))}; expected distinct ids")


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Yield documents in lists of `size`; the last may be shorter."""
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _zipped(columns: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    counts = {name: len(column) for name, column in columns.items() if isinstance(column, Sized)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"found {found}; expected equal numbers")
    missing = object()
    for number, values in enumerate(itertools.zip_longest(*columns.values(), fillvalue=missing)):
        ended = [name for name, value in zip(columns, values, strict=True) if value is missing]
        if ended:
            longer = [name for name in columns if name not in ended]
            raise InputError(f"{' and '.join(ended)} ended after {number}, before {' and '.join(longer)} did")
        yield dict(zip(columns, values, strict=True))


def _document(number: int, row: Mapping[str, Any]) -> Document:
    text, embedding = row.get("documents"), row.get("embeddings")
    if "documents" in row:
        content = _utf8(text, f"document {number}")
    else:
        content = raw_bytes(row["embeddings"].detach().cpu().contiguous())
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES)
    id = row.get("ids", digest.hexdigest())
    if not _utf8(id, f"id {number}"):
        raise InputError(f"id {number} is empty; expected a non-empty string")
    # subclasses, such as numpy's, become plain strings, as SQLite returns them
    id, text = str.__str__(id), None if text is None else str.__str__(text)
    id_is_digest = id == digest.hexdigest()
    metadata = row.get("metadata")
    return Document(
        number,
        id,
        "ids" in row,
        None if id_is_digest else digest.digest(),
        text,
        None if metadata is None else json_object(metadata, f"metadata {number}"),
        embedding,
    )


def _utf8(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"{name} is {text!r:.60} ({type(text).__name__}); expected a string")
    if (fault := unicode_fault(text)) is not None:
        raise InputError(f"{name} {fault}")
    return text.encode()


def _check_column(column: Any, name: str) -> None:
    expected = "texts" if name == "documents" else f"a list of {name}"
    # the keys of a mapping may be ids, but not texts or metadata
    not_a_list = isinstance(column, _NOT_LISTS) or (name != "ids" and isinstance(column, Mapping))
    if column is not None and (not_a_list or not isinstance(column, Iterable)):
        raise InputError(f"{name} is a {type(column).__name__}; expected {expected}")
    if isinstance(column, np.ndarray) and column.ndim != 1:
        raise InputError(f"{name} is an array of shape {column.shape}; expected {expected}")


def json_object(value: Any, name: str) -> str:
    """Return a mapping as JSON; reading it gives an equal object.

    Raises:
        InputError: value is not a mapping, or holds a value that JSON cannot; the message quotes it.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {value!r:.60} ({type(value).__name__}); expected a JSON object or None")
    _check_json(dict(value), name, 0)
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not JSON: {error}") from error


def _check_json(value: Any, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InputError(f"{name} is nested more than {_MAX_DEPTH} levels deep; expected at most {_MAX_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            # json would turn other keys into strings, and two keys could become the same string
            if not isinstance(key, str):
                raise InputError(f"{name} has the key {key!r:.60} ({type(key).__name__}); expected strings as keys")
            _check_json(key, name, depth + 1)
            _check_json(item, name, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item, name, depth + 1)
    elif isinstance(value, str):
        if (fault := unicode_fault(value)) is not None:
            raise InputError(f"{name} holds a string that {fault}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is not JSON: it holds {value!r}; expected finite numbers")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise InputError(f"{name} is not JSON: it holds {value!r:.60} ({type(value).__name__})")


def id_list(ids: Iterable[str] | str) -> list[str]:
    """Return one id, or several, as a list.

    Raises:
        InputError: ids is neither a string nor an iterable.
    """
    if isinstance(ids, str):
        return [ids]
    if ids is None or isinstance(ids, bytes | bytearray | memoryview) or not isinstance(ids, Iterable):
        raise InputError(f"ids is a {type(ids).__name__}; expected an id or a list of ids")
    return list(ids)


def read_embeddings(embeddings: Any) -> Tensor:
    """Return embeddings as a tensor of finite numbers, (N, ...).

    Raises:
        InputError: they are not such numbers; the message names the first embedding that is not finite.
    """
    try:
        if isinstance(embeddings, np.ndarray):
            # torch supports neither negative strides nor non-native byte orders
            native = embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False)
            embeddings = np.ascontiguousarray(native) if min(native.strides, default=0) < 0 else native
        # an array stays on the CPU, whatever default device the caller has set
        found = embeddings.detach() if isinstance(embeddings, Tensor) else torch.as_tensor(embeddings, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"embeddings cannot be read as a tensor ({error}); expected (N, ...) numbers") from error
    if not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
        raise InputError(f"embeddings are {found.dtype} ({found.layout}, {found.device}); expected floating point")
    if found.dim() < 2 or 0 in found.shape[1:]:
        raise InputError(f"embeddings are {tuple(found.shape)}; expected (N, ...)")
    for first in range(0, len(found), _CHECKED_ROWS):
        finite = torch.isfinite(found[first : first + _CHECKED_ROWS]).flatten(1).all(dim=1)
        if not bool(finite.all()):
            number = first + int((~finite).nonzero()[0])
            raise InputError(f"embedding {number} holds NaN or an infinity; expected finite numbers")
    return found
