"""The outermost ASGI middleware: keys, limits on bodies and on concurrent requests, logs, and a 500 without details.

It reads the whole body before the application sees the request, so a slow client occupies no thread of it, and no more
memory than the limits allow.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixencoder.serving.errors import RequestError, overloaded
from mixencoder.serving.logs import log
from mixencoder.serving.metrics import Metrics
from mixencoder.serving.settings import Limits

OPEN_PATHS = ("/health",)
"""Paths that need no key and do not count as requests in work."""

ErrorForm = Callable[[str, RequestError], dict[str, Any]]
"""Turns a path and an error into the body of the answer."""


class Gate:
    """Lets requests through to the application.

    Args:
        app: the application.
        keys: API keys of which a request must give one; empty: none is needed.
        limits: the limits.
        metrics: counts requests.
        error_form: the body of an error, by path.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], limits: Limits, metrics: Metrics, error_form: ErrorForm
    ) -> None:
        self._app, self._limits, self._metrics, self._error_form = app, limits, metrics, error_form
        # digests have one length, so that comparing takes the same time for every key
        self._digests = [_digest(key.encode()) for key in keys]
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or pass another kind of ASGI event on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, answer = time.perf_counter(), _Answer(send)
        counts = scope["path"] not in OPEN_PATHS
        self._in_work += counts
        self._metrics.in_work.set(self._in_work)
        scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        try:
            await self._serve(scope, receive, answer, limited=counts)
        except RequestError as error:
            await answer.error(error, self._error_form(scope["path"], error))
        except Exception as error:
            log("fault", level=logging.ERROR, error=error, request=scope["state"]["request_id"])
            told = RequestError(500, "backend", "the server failed to answer; its log says more")
            await answer.error(told, self._error_form(scope["path"], told))
        finally:
            self._in_work -= counts
            self._metrics.in_work.set(self._in_work)
            self._note(scope, answer.status, time.perf_counter() - start)

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer", *, limited: bool) -> None:
        headers = dict(scope["headers"])
        if limited and self._digests and not self._has_key(headers.get(b"authorization", b"")):
            raise RequestError(
                401,
                "authentication",
                "an API key is missing or wrong; expected Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        if limited and self._in_work > self._limits.requests:
            raise overloaded(f"{self._limits.requests} requests are in work; try again later")
        body = await self._body(headers, receive)
        if body is None:
            return
        await self._app(scope, _replay(body, receive), answer)

    def _has_key(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        digest = _digest(given.strip())
        # all are compared, so that the time does not tell which one matched
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Read the body; return None if the client has gone."""
        limit = self._limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > limit:
            raise _body_too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _body_too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestError(
                408,
                "validation",
                f"the body did not arrive within {self._limits.body_seconds:g} seconds",
                {"Connection": "close"},
            ) from None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # the path of the route: a path that a client made up is not logged, and does not become a label
        endpoint = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        state = scope["state"]
        fields = {"request": state["request_id"], "method": scope["method"], "endpoint": endpoint, "status": status}
        log("request", **fields, seconds=round(seconds, 6), **state.get("log", {}))


class _Answer:
    """A `send` that notes the status and can answer with an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 499
        """Until an answer starts: the client closed the connection."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def error(self, error: RequestError, body: dict[str, Any]) -> None:
        if self.status != 499:
            # an answer has started: nothing can be added to it
            return
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self({"type": "http.response.body", "body": content})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that hands over a body that was read, and then what the client does."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _body_too_large(limit: int) -> RequestError:
    # the rest of the body is not read, so the connection cannot be used again
    return RequestError(
        413,
        "validation",
        f"the body is larger than {limit:,} bytes, the most that this server takes",
        {"Connection": "close"},
    )
