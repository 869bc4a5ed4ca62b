"""A port that is reserved is nobody else's until it is taken, and who calls meanwhile is answered then."""

from __future__ import annotations

import errno
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from flux_ray import ports

pytestmark = pytest.mark.unit


def test_nobody_else_gets_a_reserved_port():
    port = ports.reserve("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError) as refused:
        other.bind(("127.0.0.1", port))
    assert refused.value.errno == errno.EADDRINUSE
    held = ports.taken(port)
    assert held is not None and held.getsockname()[1] == port
    assert ports.taken(port) is None, "once"
    held.close()


def test_who_calls_early_is_answered_by_who_takes_it():
    port = ports.reserve("127.0.0.1")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as early:
        held = ports.taken(port)
        assert held is not None
        with held, held.accept()[0] as answered:
            answered.sendall(b"here")
            assert early.recv(4) == b"here"


def test_a_store_listens_on_a_reserved_port():
    port = ports.reserve("127.0.0.1")
    held = ports.taken(port)
    assert held is not None
    within = timedelta(seconds=30)
    server = dist.TCPStore("127.0.0.1", port, 1, is_master=True, timeout=within, master_listen_fd=held.detach())
    client = dist.TCPStore("127.0.0.1", port, 1, is_master=False, timeout=within)
    client.set("weights", "here")
    assert server.port == port and server.get("weights") == b"here"


def test_a_port_of_one_address_is_not_reached_at_another():
    with ports.listen("127.0.0.1") as held, socket.socket() as other:
        other.settimeout(5)
        with pytest.raises(OSError):
            other.connect(("127.0.0.2", held.getsockname()[1]))
