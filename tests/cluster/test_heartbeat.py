"""Who answers nothing is found, and who is slow is not; deadlines follow what is usual."""

from __future__ import annotations

import asyncio

import pytest

from flux_ray.cluster import heartbeat
from flux_ray.cluster.group import ActorDied
from flux_ray.cluster.heartbeat import Heartbeat
from flux_ray.cluster.usual import Usual
from tests.fakes.simulated import SimulatedTime

pytestmark = pytest.mark.unit


class Pinged:
    """Answers after `answer_s`; None: never."""

    def __init__(self, answer_s: float | None) -> None:
        self.answer_s, self.role, self.index = answer_s, "engine", 0

    async def ping(self, within_s: float) -> bool:
        answers = self.answer_s is not None and self.answer_s <= within_s
        await asyncio.sleep(self.answer_s if answers else within_s)
        return answers


class Dead(Pinged):
    async def ping(self, within_s: float) -> bool:
        raise ActorDied("gone", role="engine", index=0)


def silent_after(monkeypatch, actors, seconds: float):
    """(actor, seconds it was silent, when) of all that were found within so many seconds."""
    clock, found = SimulatedTime(), []
    monkeypatch.setattr(heartbeat, "now_s", clock.time)

    async def whole() -> None:
        beat = Heartbeat(lambda: actors, lambda actor, silent_s: found.append((actor, silent_s, clock.time())))
        beating = asyncio.ensure_future(beat.run())
        await asyncio.sleep(seconds)
        beating.cancel()

    clock.run(whole())
    clock.close()
    return found


def test_a_silent_one_is_found_and_the_others_are_left_alone(monkeypatch):
    silent = Pinged(None)
    found = silent_after(monkeypatch, [Pinged(0.01), silent, Dead(None)], 16)
    assert found == [(silent, heartbeat.LEAST_PATIENCE_S, heartbeat.EVERY_S + heartbeat.LEAST_PATIENCE_S)]


def test_where_all_are_slow_one_is_given_more_time(monkeypatch):
    slow = Pinged(2.0)
    assert silent_after(monkeypatch, [slow], 200) == []
    slow.answer_s = heartbeat.LEAST_PATIENCE_S - 1
    assert silent_after(monkeypatch, [slow], 200) == []


def test_a_deadline_follows_what_is_usual_and_never_passes_the_configs():
    usual = Usual()
    assert usual.bound_s("train", 1800.0) == 1800.0
    for seconds in (4.0, 5.0, 9.0):
        usual.saw("train", seconds)
    assert usual.bound_s("train", 1800.0) == 180.0
    assert usual.bound_s("train", 100.0) == 100.0
    assert usual.bound_s("publish", 1800.0) == 1800.0
    for _ in range(50):
        usual.saw("train", 0.1)
    assert usual.bound_s("train", 1800.0) == 120.0
