"""Whether the server of a cluster that was joined still answers: real sockets, short deadlines."""

from __future__ import annotations

import asyncio

import pytest

from flux_ray.cluster import joined_ray
from flux_ray.cluster.joined_ray import JoinedRay

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]

DEADLINE_S = 0.6


async def serve(port: int = 0) -> asyncio.Server:
    return await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)


async def test_a_server_that_comes_back_in_time_is_not_dead_and_one_that_stays_away_is(monkeypatch):
    monkeypatch.setattr(joined_ray, "LOOK_EVERY_S", 0.05)
    server = await serve()
    port = server.sockets[0].getsockname()[1]
    watched = JoinedRay(f"127.0.0.1:{port}", deadline_s=DEADLINE_S)
    death = asyncio.ensure_future(watched.death())
    await asyncio.sleep(1.5 * DEADLINE_S)
    assert not death.done() and watched.dead is None, "it answers"
    server.close()
    await asyncio.sleep(DEADLINE_S / 3)
    server = await serve(port)
    await asyncio.sleep(1.5 * DEADLINE_S)
    assert not death.done(), "it was back in time"
    server.close()
    died = await asyncio.wait_for(death, 20 * DEADLINE_S)
    assert watched.dead is died
    assert str(died) == f"Ray's server at 127.0.0.1:{port} has not answered for 0.6 s (cluster.server_deadline_s)"
