"""Ports that stay ours from when they are chosen until they are used: in between, any process could take a free one.

Takes:  nothing.
Gives:  `listen`; `reserve`: a port that this process listens on; `taken`: its socket, for who is to answer there.
Keeps:  the sockets that were not taken yet. Who calls them meanwhile is answered when they are.
"""

from __future__ import annotations

import socket

_held: dict[int, socket.socket] = {}


def listen(address: str) -> socket.socket:
    """On a free port of that address alone: nobody who can't reach the address reaches it."""
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def reserve(address: str) -> int:
    """A free port of that address. Held until `taken`, or as long as the process lives."""
    listening = listen(address)
    port: int = listening.getsockname()[1]
    _held[port] = listening
    return port


def taken(port: int) -> socket.socket | None:
    """The socket that listens there, now the caller's to close; None where the port was not reserved here."""
    return _held.pop(port, None)
