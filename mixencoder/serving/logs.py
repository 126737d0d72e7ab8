"""Structured logs: one JSON object per line on standard error, without texts, ids, keys or error messages of texts."""

import json
import logging
import sys
import time
import traceback
from typing import Any

from mixencoder.errors import MixEncoderError

LOGGER = logging.getLogger("mixencoder.serving")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON; `event` is the message, further fields come from ``extra={"fields": ...}``.

    An exception is written as its type and the places in the code, not as its message, which may quote a text. The
    messages of index faults, which only name files, are kept.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage() if record.name != "asyncio" else "asyncio",
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry |= described(record.exc_info[1])
        return json.dumps(entry, ensure_ascii=True)


def described(error: BaseException) -> dict[str, Any]:
    """Return what a log may hold of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    found: dict[str, Any] = {
        "error": type(error).__name__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
    }
    if isinstance(error, MixEncoderError) and type(error).__name__.startswith("Index"):
        found["message"] = str(error)
    return found


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Write an event with fields."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)


def start_logging(level: int = logging.INFO) -> None:
    """Send this package's and uvicorn's logs to standard error as JSON lines."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in (LOGGER.name, "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
