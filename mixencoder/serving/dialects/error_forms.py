"""The bodies of errors, by path: each dialect's clients look for the message under another name.

Sources: the OpenAPI page of text-embeddings-inference (`error`, `error_type`); the API references of Cohere (`message`)
and Jina (`detail`); the OpenAI-compatible server of vLLM (`error` with `message`, `type`, `code`).
"""

import dataclasses
from typing import Any

from pydantic import BaseModel

from mixencoder.serving.errors import RequestError

_LONGEST = 2000
"""Characters of a message."""


class TeiError(BaseModel):
    """An error of `/rerank`."""

    error: str
    error_type: str
    message: str


class CohereJinaError(BaseModel):
    """An error of `/v1/rerank` and `/v2/rerank`: Cohere's clients read `message`, Jina's `detail`."""

    message: str
    detail: str


class OpenAIErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class OpenAIError(BaseModel):
    """An error of the other endpoints."""

    error: OpenAIErrorDetail


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """Return the body of an error for a path.

    A message may quote names and ids of the request, so it is cut, and what UTF-8 cannot encode is replaced.
    """
    message = error.message if len(error.message) <= _LONGEST else f"{error.message[:_LONGEST]}..."
    error = dataclasses.replace(error, message=message.encode("utf-8", "replace").decode("utf-8"))
    if path.rstrip("/") == "/rerank":
        form: BaseModel = TeiError(error=error.message, error_type=error.kind, message=error.message)
    elif path.rstrip("/") in ("/v1/rerank", "/v2/rerank"):
        form = CohereJinaError(message=error.message, detail=error.message)
    else:
        form = OpenAIError(error=OpenAIErrorDetail(message=error.message, type=error.kind, code=error.status))
    return form.model_dump()


_DESCRIBED = {
    400: "The body is no valid JSON, or the Host header names an unknown host.",
    401: "The server needs an API key.",
    403: "The server is read-only.",
    404: "There is no such model, index or candidate.",
    408: "The body did not arrive in time.",
    413: "A limit is exceeded.",
    415: "The body has another Content-Type than application/json.",
    422: "A field or a text cannot be used.",
    429: "The server has no room now; Retry-After says when to try again.",
    503: "The server stops, or another process writes the index.",
}
"""What each status means, for OpenAPI."""


def error_responses(form: type[BaseModel], *further: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of an endpoint with a body for OpenAPI."""
    return _responses(form, 400, 401, 404, 408, 413, 415, 422, 429, 503, *further)


def read_responses(form: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the errors of an endpoint without a body for OpenAPI."""
    return _responses(form, 400, 401, 429)


def _responses(form: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": form, "description": _DESCRIBED[status]} for status in sorted(statuses)}
