"""Send many HTTP requests over a fixed number of connections, and measure each: a client that costs little itself.

Only for servers on this machine.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TIMEOUT = 120.0
"""Seconds that an answer may take."""


class Request(NamedTuple):
    """A POST request."""

    path: str
    body: dict[str, Any]

    def encoded(self, host: str) -> bytes:
        """The bytes to send."""
        content = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@dataclass
class Answers:
    """What came back, in the order of the requests."""

    statuses: list[int]
    bodies: list[bytes]
    seconds: list[float]
    """Of each request, from sending it to the last byte of its answer."""
    wall_seconds: float
    """From the first request to the last answer."""


def send(addresses: Sequence[str], requests: Sequence[Request], total: int, connections: int) -> Answers:
    """Send `total` requests, the given ones in turn, over connections that are spread over the servers.

    Args:
        addresses: of servers, such as http://127.0.0.1:8000.
        requests: the different requests.
        total: how many to send.
        connections: how many are open at the same time; each sends its next request when its answer has come.

    Raises:
        ValueError: an address is not on this machine.
    """
    places = [urlsplit(address) for address in addresses]
    if not all(place.hostname in ("127.0.0.1", "localhost", "::1") for place in places):
        raise ValueError(f"{addresses} are not all on this machine")
    return asyncio.run(_send(places, requests, total, connections))


async def _send(places: Sequence[Any], requests: Sequence[Request], total: int, connections: int) -> Answers:
    answers = Answers([0] * total, [b""] * total, [0.0] * total, 0.0)
    encoded = [[request.encoded(place.netloc) for request in requests] for place in places]
    numbers = iter(range(total))

    async def work(which: int) -> None:
        place = places[which % len(places)]
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        for number in numbers:
            start = time.perf_counter()
            writer.write(encoded[which % len(places)][number % len(requests)])
            async with asyncio.timeout(TIMEOUT):
                answers.statuses[number], answers.bodies[number] = await _answer(reader)
            answers.seconds[number] = time.perf_counter() - start
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(work(which) for which in range(connections)))
    answers.wall_seconds = time.perf_counter() - start
    return answers


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    return int(first.split()[1]), await reader.readexactly(int(headers["content-length"]))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def resident_bytes(pid: int) -> int | None:
    """Memory of a process (Linux); None where that cannot be read."""
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024
