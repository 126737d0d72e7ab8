"""The settings of a server: address, keys, limits and threads, checked when they are made."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixencoder.base.inputs import local_path
from mixencoder.errors import InputError
from mixencoder.serving.hosts import ANY

KEYS_VARIABLE = "MIXENCODER_API_KEYS"
"""Environment variable with API keys, separated by commas or white space."""
_SHORTEST_KEY = 16
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Limits:
    """Limits on requests; the defaults keep a server of the bundled model below 2 GiB of memory.

    Raises:
        InputError: a value cannot be used; the message names it, what was found and what was expected.
    """

    body_bytes: int = 4 * 2**20
    """Bytes of a request's body."""
    body_seconds: float = 30.0
    """Seconds until a request's body must have arrived."""
    candidates: int = 1000
    """Texts or ids of a request, and results per query."""
    queries: int = 32
    """Queries of a request that ranks the same candidates for several queries."""
    characters: int = 20_000
    """Characters of a query, a text or an id."""
    tokens: int = 262_144
    """Tokens that the model reads of all texts of a request; a text counts as far as it is read."""
    requests: int = 64
    """Requests in work at the same time, waiting ones included."""
    queue: int = 48
    """Requests that wait for the model."""

    def __post_init__(self) -> None:
        _check(
            self, at_least=dict.fromkeys(("body_bytes", "candidates", "queries", "characters", "tokens", "requests"), 1)
        )


@dataclass(frozen=True)
class ServeConfig:
    """Settings of ``mixencoder serve``.

    Raises:
        InputError: a value cannot be used; the message names it, what was found and what was expected.
    """

    host: str = "127.0.0.1"
    """Address to listen on; by default only programs on this machine can connect."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    names: tuple[str, ...] = ()
    """Names of the model that requests may give; the first is shown. Empty: the checkpoint's name."""
    allow_writes: bool = False
    """Whether requests may change the index."""
    api_keys: tuple[str, ...] = ()
    """Keys of which a request must give one; empty: none is needed."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered besides those of `mixencoder.serving.hosts`; "*" answers all. Empty:
    `host`, and all if there are API keys, which a foreign page does not have."""
    threads: int | None = None
    """Threads that compute. None: as many as PyTorch uses, but not more than the cores that this process may use."""
    gather_seconds: float = 0.002
    """How long the first request of a pass waits for others to share the pass."""
    shutdown_seconds: float = 30.0
    """How long requests in work may take to finish after SIGTERM."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """Limits on requests."""

    def __post_init__(self) -> None:
        _check(self, at_least={"threads": 1}, at_most={"port": 65_535, "threads": _MOST_THREADS})
        for name in ("names", "api_keys", "allowed_hosts"):
            found = getattr(self, name)
            if not isinstance(found, tuple) or not all(isinstance(value, str) and value.strip() for value in found):
                raise InputError(f"{name} holds an entry that is no text; expected non-empty strings")
        if not isinstance(self.host, str) or not self.host.strip():
            raise InputError(f"host is {self.host!r}; expected an address such as 127.0.0.1")
        if short := sum(len(key) < _SHORTEST_KEY for key in self.api_keys):
            raise InputError(
                f"{short} of the API keys are shorter than {_SHORTEST_KEY} characters; expected longer ones"
            )

    @property
    def answered_hosts(self) -> tuple[str, ...]:
        """The names for `mixencoder.serving.hosts.HostCheck`."""
        if not self.allowed_hosts and self.api_keys:
            return (ANY,)
        return (self.host, *self.allowed_hosts)


def read_api_keys(path: str | Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Read API keys from a file, one per line (``#`` starts a comment), and from `KEYS_VARIABLE`.

    Raises:
        InputError: the file cannot be read or holds no key, or the variable is set but holds none.
    """
    keys: list[str] = []
    if path is not None:
        try:
            lines = local_path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of API keys {path} cannot be read: {error}") from error
        keys += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not keys:
            raise InputError(f"the file of API keys {path} holds no key; expected one per line")
    if (value := environment.get(KEYS_VARIABLE)) is not None:
        given = value.replace(",", " ").split()
        if not given:
            raise InputError(f"{KEYS_VARIABLE} is set but holds no key; unset it to serve without keys")
        keys += given
    return tuple(dict.fromkeys(keys))


def _check(settings: Any, *, at_least: Mapping[str, int], at_most: Mapping[str, int] | None = None) -> None:
    """Check the booleans and numbers of a dataclass of settings."""
    for entry in dataclasses.fields(settings):
        name, value, kind = entry.name, getattr(settings, entry.name), str(entry.type).removeprefix("<class '")
        if kind.startswith("bool") and not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}; expected True or False")
        if not kind.startswith(("int", "float")) or (value is None and "None" in kind):
            continue
        kinds = int if kind.startswith("int") else int | float
        lowest, highest = at_least.get(name, 0), (at_most or {}).get(name, math.inf)
        usable = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if not usable or not lowest <= value <= highest:
            expected = "an integer" if kinds is int else "a number"
            upper = "" if highest == math.inf else f" and at most {highest}"
            raise InputError(f"{name} is {value!r}; expected {expected} of at least {lowest}{upper}")
