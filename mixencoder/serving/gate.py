"""The outermost ASGI middleware: keys, limits on bodies and on concurrent requests, logs, and a 500 without details.

It reads the whole body before the application sees the request, so a slow client occupies no thread of it, and no more
memory than the limits allow.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixencoder.serving.errors import RequestError, overloaded
from mixencoder.serving.hosts import HostCheck
from mixencoder.serving.logs import log
from mixencoder.serving.metrics import Metrics
from mixencoder.serving.settings import Limits

OPEN_PATHS = ("/health", "/", "/demo")
"""Paths that need no key and do not count as requests in work."""

_DISCARDED_BYTES = 16 * 2**20
_DISCARDED_SECONDS = 5.0
"""How much of a body is read and thrown away, so that a client that still sends it sees the answer."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")

ErrorForm = Callable[[str, RequestError], dict[str, Any]]
"""Turns a path and an error into the body of the answer."""


class Gate:
    """Lets requests through to the application.

    Args:
        app: the application.
        keys: API keys of which a request must give one; empty: none is needed.
        hosts: which Host headers are answered.
        limits: the limits.
        metrics: counts requests.
        error_form: the body of an error, by path.
        paths: the paths of the application; others are not logged, and do not become labels of metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        hosts: HostCheck,
        limits: Limits,
        metrics: Metrics,
        error_form: ErrorForm,
        paths: Iterable[str],
    ) -> None:
        self._app, self._limits, self._metrics, self._error_form = app, limits, metrics, error_form
        self._hosts = hosts
        self._paths = frozenset(paths)
        # digests have one length, so that comparing takes the same time for every key
        self._digests = [_digest(key.encode()) for key in keys]
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or pass another kind of ASGI event on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        answer = _Answer(send, start)
        scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        try:
            try:
                body = await self._admit(scope, receive)
            except RequestError as error:
                self._release(scope)
                if error.status != 408:
                    await _discard(receive)
                raise
            if body is not None:
                await self._app(scope, _replay(body, receive), answer)
        except RequestError as error:
            await answer.error(error, self._error_form(scope["path"], error))
        except Exception as error:
            log("fault", level=logging.ERROR, error=error, request=scope["state"]["request_id"])
            told = RequestError(500, "backend", "the server failed to answer; its log says more")
            await answer.error(told, self._error_form(scope["path"], told))
        finally:
            self._release(scope)
            self._note(scope, answer.status, time.perf_counter() - start)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes | None:
        """Check a request and return its body; None if the client has gone.

        Raises:
            RequestError: it is not admitted.
        """
        headers, limited = dict(scope["headers"]), scope["path"] not in OPEN_PATHS
        if limited and not self._hosts.allows(headers.get(b"host")):
            raise RequestError(
                400,
                "forbidden",
                "the Host header names a host that this server does not know; start it with --allowed-host NAME",
            )
        if limited and self._digests and not self._has_key(headers.get(b"authorization", b"")):
            raise RequestError(
                401,
                "authentication",
                "an API key is missing or wrong; expected Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        if limited and self._in_work >= self._limits.requests:
            raise overloaded(f"{self._limits.requests} requests are in work; try again later")
        if limited:
            scope["state"]["in_work"] = True
            self._count(1)
        return await self._body(headers, receive)

    def _release(self, scope: Scope) -> None:
        if scope["state"].pop("in_work", False):
            self._count(-1)

    def _count(self, change: int) -> None:
        self._in_work += change
        self._metrics.in_work.set(self._in_work)

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
        endpoint = scope["path"] if scope["path"] in self._paths else "other"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        state = scope["state"]
        fields = {"request": state["request_id"], "method": method, "endpoint": endpoint, "status": status}
        log("request", **fields, seconds=round(seconds, 6), **state.get("log", {}))


class _Answer:
    """A `send` that notes the status, tells the time since `start`, and can answer with an error."""

    def __init__(self, send: Send, start: float) -> None:
        self._send, self._start = send, start
        self.status = 499
        """Until an answer starts: the client closed the connection."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            spent = f"total;dur={1000 * (time.perf_counter() - self._start):.1f}"
            message["headers"] = [*message.get("headers", []), (b"server-timing", spent.encode())]
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


async def _discard(receive: Receive) -> None:
    """Read what a client still sends and throw it away, up to a limit: closing at once could lose the answer."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDED_SECONDS):
            while size < _DISCARDED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


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
