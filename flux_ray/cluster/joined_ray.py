"""The server (GCS) of a cluster that a run has joined: whether it still answers.

Gives:  `JoinedRay`: `death`, once the server has been silent for too long.
Knows:  without its server Ray ends this process after a minute, without a word. Until then calls between actors work,
        and nothing can be started, ended or asked of the cluster. A server that is fault-tolerant may come back.
"""

from __future__ import annotations

import asyncio

from flux_ray.clock import now_s
from flux_ray.cluster.group import ServerLost

LOOK_EVERY_S = 1.0
CONNECT_S = 2.0


class JoinedRay:
    def __init__(self, address: str, *, deadline_s: float) -> None:
        """`address`: HOST:PORT of the server. `deadline_s`: how long it may be silent."""
        host, _, port = address.rpartition(":")
        self._host, self._port, self._deadline_s = host.strip("[]"), int(port), deadline_s
        self.dead: ServerLost | None = None

    async def death(self) -> ServerLost:
        """Waits until the server has been silent for so long."""
        answered_s = now_s()
        while now_s() - answered_s < self._deadline_s:
            await asyncio.sleep(LOOK_EVERY_S)
            if await self._answers():
                answered_s = now_s()
        self.dead = ServerLost(f"Ray's server at {self._host}:{self._port} has not answered for {self._deadline_s:g} s "
                               "(cluster.server_deadline_s)")
        return self.dead

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True
