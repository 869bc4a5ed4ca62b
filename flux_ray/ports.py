"""Ports that stay ours from when they are chosen until they are used: in between, any process could take a free one.

Takes:  nothing.
Gives:  `reserve`: a port that this process listens on; `taken`: its socket, for who is to answer there.
Keeps:  the sockets that were not taken yet. Who calls them meanwhile is answered when they are.
"""

from __future__ import annotations

import socket

_held: dict[int, socket.socket] = {}


def reserve() -> int:
    """A free port of all interfaces. Held until `taken`, or as long as the process lives."""
    both = socket.has_dualstack_ipv6()
    listening = socket.create_server(
        ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )
    port: int = listening.getsockname()[1]
    _held[port] = listening
    return port


def taken(port: int) -> socket.socket | None:
    """The socket that listens there, now the caller's to close; None where the port was not reserved here."""
    return _held.pop(port, None)
