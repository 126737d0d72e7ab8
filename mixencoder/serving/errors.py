"""What a request that cannot be answered gets: a status, a kind and a message, the same for all dialects.

Each dialect writes them in its own form (`mixencoder.serving.dialects.error_forms`).
"""

from dataclasses import dataclass, field

from mixencoder.errors import (
    DuplicateIdError,
    IndexLockedError,
    IndexStorageError,
    InputError,
    MixEncoderError,
    UnknownIdError,
)


@dataclass
class RequestError(Exception):
    """A request cannot be answered."""

    status: int
    """HTTP status."""
    kind: str
    """One of the error types of text-embeddings-inference: "validation", "tokenizer", "empty", "overloaded",
    "unhealthy", "backend"; or "authentication", "not_found", "forbidden"."""
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def too_large(what: str, found: int, limit: int, unit: str) -> RequestError:
    """Return the error for something that exceeds a limit."""
    return RequestError(413, "validation", f"{what} has {found:,} {unit}; this server takes at most {limit:,}")


def overloaded(message: str, retry_after: int = 1) -> RequestError:
    """Return the error for a request that the server has no room for now."""
    return RequestError(429, "overloaded", message, {"Retry-After": str(retry_after)})


def request_error(error: MixEncoderError) -> RequestError | None:
    """Return what a client is told of an error of the library; None if it is a fault of the server.

    Messages about faults may name files of the server, so they are logged and not returned.
    """
    if isinstance(error, UnknownIdError):
        return RequestError(404, "not_found", str(error))
    if isinstance(error, InputError | DuplicateIdError):
        return RequestError(422, "validation", str(error))
    if isinstance(error, IndexLockedError):
        message = "another process is writing the index; try again"
        return RequestError(503, "unhealthy", message, {"Retry-After": "1"})
    if isinstance(error, IndexStorageError):
        message = "the index cannot be written or read now; send the request again later"
        return RequestError(503, "unhealthy", message)
    return None
