"""Finds actors whose processes are there and answer nothing: stopped, or stuck.

Takes:  the groups to watch; what to do with a silent one.
Gives:  `Heartbeat.run`, for as long as the run goes on.
Knows:  a process answers a ping whatever it computes, as long as its event loop lives. How long that takes here is
        measured: a loaded machine is given more time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from flux_ray.clock import now_s
from flux_ray.cluster.group import Actor, ActorDied

EVERY_S = 5.0  # between two pings of one actor
MOST_PER_S = 50.0  # pings of all actors together: each costs the driver about a millisecond
LEAST_PATIENCE_S, MOST_PATIENCE_S = 10.0, 60.0
USUAL_TIMES = 20.0  # an answer that takes so many times the slowest of late doesn't come any more
FADES = 0.9  # the slowest of late fades by this a round
LATE_S = 5.0  # the driver itself was stopped, or loaded, where a wait took so much longer: nobody is to blame

#: Of a silent actor: itself, and the seconds for which it was silent.
OnSilent = Callable[[Actor[Any], float], None]


class Heartbeat:
    def __init__(self, actors: Callable[[], Iterable[Actor[Any]]], on_silent: OnSilent) -> None:
        """`actors`: those that stand at the moment."""
        self._actors, self._on_silent = actors, on_silent
        self._slowest_s = 0.0  # answer of late

    @property
    def patience_s(self) -> float:
        return min(MOST_PATIENCE_S, max(LEAST_PATIENCE_S, USUAL_TIMES * self._slowest_s))

    async def run(self) -> None:
        while True:
            actors = list(self._actors())
            await asyncio.sleep(max(EVERY_S, len(actors) / MOST_PER_S))
            await asyncio.gather(*(self._ping(actor) for actor in actors))
            self._slowest_s *= FADES

    async def _ping(self, actor: Actor[Any]) -> None:
        start_s, patience_s = now_s(), self.patience_s
        try:
            answers = await actor.ping(patience_s)
        except ActorDied:
            return  # its own watch sees to it
        took_s = now_s() - start_s
        if answers:
            self._slowest_s = max(self._slowest_s, took_s)
        elif took_s < patience_s + LATE_S:
            self._on_silent(actor, took_s)
