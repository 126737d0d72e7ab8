"""Which Host headers are answered: protection of servers without API keys against DNS rebinding.

A page of another site can let its own name resolve to this server's address. Its scripts then may call this server, as
the browser takes both for one site. The Host header shows the foreign name.
"""

import ipaddress
import socket
from collections.abc import Iterable

ANY = "*"
"""In a list of names: answer every host."""


class HostCheck:
    """Decides by the Host header whether a request is answered.

    Always answered are addresses, localhost, this machine's name, and names without a dot, as no other site can have
    such a name.

    Args:
        names: further names; `ANY` allows all.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.lower().rstrip(".") for name in (*names, socket.gethostname())}

    def allows(self, header: bytes | None) -> bool:
        """Return whether a request with this Host header is answered; browsers always send one."""
        if header is None or ANY in self._names:
            return True
        name = _host_of(header.decode("latin-1")).lower().rstrip(".")
        return "." not in name or name.endswith(".localhost") or name in self._names or _is_address(name)


def _host_of(header: str) -> str:
    """Return the host of a header ``host``, ``host:port`` or ``[address]:port``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    host, _, port = header.rpartition(":")
    return host if host and port.isdigit() else header


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
