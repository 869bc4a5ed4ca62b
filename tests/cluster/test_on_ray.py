"""A cluster that others started: what actors give stays with them until nobody needs it; calls travel together, in
order; a call ends in a value or in one line, or is cancelled where it runs."""

from __future__ import annotations

import asyncio
import gc
import os
import sys

import numpy as np
import pytest

from flux_ray.cluster.group import ActorDied, ActorError
from flux_ray.cluster.host import Host
from flux_ray.cluster.plan import Plan, Role
from flux_ray.errors import UserError

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

DEADLINE_S = 60
NUM_STEPS, NUM_GROUPS = 100, 10


class Store:
    def __init__(self) -> None:
        self.abandoned = 0
        self.order: list[int] = []

    async def waits(self) -> tuple[int, int]:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        return 0, 0

    def num_abandoned(self) -> int:
        return self.abandoned

    def note(self, number: int) -> list[int]:
        self.order.append(number)
        return self.order

    def group(self, num_bytes: int) -> tuple[np.ndarray, int]:
        return np.zeros(num_bytes, np.uint8), num_bytes

    def sizes(self, arrays: dict[str, list[np.ndarray]]) -> list[int]:
        return [len(array) for array in arrays["anywhere"]]

    def breaks(self) -> None:
        raise KeyError("no such thing")

    def breaks_strangely(self) -> None:
        class Local(Exception):
            def __reduce__(self):
                raise TypeError("it doesn't travel")

        raise Local("as it is")

    def refuses(self) -> None:
        raise UserError("data.jsonl, row 3: no answer")

    def dies(self) -> None:
        os._exit(3)


def gives_up() -> None:
    raise TimeoutError("the hub did not answer")


class CountingHost(Host):
    """Tells how many letters came, and how many values it holds."""

    async def post(self, letter):
        self.num_letters = getattr(self, "num_letters", 0) + 1
        return await super().post(letter)

    async def counts(self) -> tuple[int, int]:
        return getattr(self, "num_letters", 0), len(self._shelf)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no other process can import this file
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


async def test_calls_and_values(ray, tmp_path, monkeypatch):
    from flux_ray.cluster.on_ray import Cluster

    monkeypatch.setattr("flux_ray.cluster.on_ray.Host", CountingHost)
    cluster = Cluster(log_dir=tmp_path, plugins=[])
    cluster.connect(None, cpus=2)
    role = Role("store", count=2, cpus=1.0, gpus=0.0)
    try:
        await cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=DEADLINE_S)
        group = cluster.spawn(role, env={}, may_die=True)
        await group.build(Store, [{}, {}], deadline_s=DEADLINE_S)
        await they_travel_together_and_in_order(group)
        await values_are_fetched_and_forgotten(group)
        await a_failure_is_one_line(group, ray.remote(gives_up))
        await a_call_is_cancelled_where_it_runs(group)
        await nothing_is_left_of_many_steps(group)
        await a_death_fails_all_that_wait(group)
    finally:
        await asyncio.wait_for(cluster.close(), DEADLINE_S)
    assert ray.is_initialized(), "a cluster that was there before is left as it was"


async def result(group, reference, index=0):
    return await group.result(reference, index=index, what="it", deadline_s=DEADLINE_S)


async def num_held(group, index):
    return (await group.actors[index].counts.remote())[1]


async def num_letters(group, index):
    return (await group.actors[index].counts.remote())[0]


async def they_travel_together_and_in_order(group):
    before = await num_letters(group, 0)
    noted = [group.submit(0, "note", number) for number in range(50)]
    assert await result(group, noted[-1]) == list(range(50))
    assert await num_letters(group, 0) == before + 1
    later = []
    for number in range(50, 60):  # each in a letter of its own, however Ray brings them
        later.append(group.submit(0, "note", number))
        await asyncio.sleep(0.005)
    assert await result(group, later[-1]) == list(range(60))


async def values_are_fetched_and_forgotten(group):
    large, size = group.submit(0, "group", 200_000, num_returns=2)
    assert await result(group, size) == 200_000
    small, size = group.submit(1, "group", 10, num_returns=2)
    assert await result(group, size, 1) == 10
    assert (await num_held(group, 0), await num_held(group, 1)) == (1, 1)
    arguments = {"anywhere": [large, small, large]}
    assert await group.call(1, "sizes", arguments, deadline_s=DEADLINE_S) == [200_000, 10, 200_000]
    del arguments, large, small
    gc.collect()
    await group.call_all("num_abandoned", deadline_s=DEADLINE_S)  # a letter, with which the news goes
    assert (await num_held(group, 0), await num_held(group, 1)) == (0, 0)


async def a_failure_is_one_line(group, never_reached):
    with pytest.raises(ActorError, match="store 0, breaks: KeyError: 'no such thing'") as failed:
        await group.call(0, "breaks", deadline_s=DEADLINE_S)
    assert "in breaks" in str(failed.value.__cause__), "the actor's own traceback"
    with pytest.raises(ActorError, match="store 0, breaks_strangely: Local: as it is"):
        await group.call(0, "breaks_strangely", deadline_s=DEADLINE_S)
    with pytest.raises(UserError, match=r"^data.jsonl, row 3: no answer$"):
        await group.call(0, "refuses", deadline_s=DEADLINE_S)
    with pytest.raises(ActorError, match=r"store 0, it: TimeoutError: .*the hub did not answer"):
        await result(group, never_reached.options(num_cpus=0).remote())
    with pytest.raises(TimeoutError, match=r"store 0 did not finish waits within 0.2 s; its log: .*store-0.log"):
        await group.call(0, "waits", deadline_s=0.2)


async def a_call_is_cancelled_where_it_runs(group):
    _, waiting = group.submit(0, "waits", num_returns=2)
    await group.call(0, "num_abandoned", deadline_s=DEADLINE_S)   # it has begun by now
    unsent = group.submit(0, "note", -1)
    group.cancel(unsent)
    group.cancel(waiting)
    for _ in range(100):
        if abandoned := await group.call(0, "num_abandoned", deadline_s=DEADLINE_S):
            break
        await asyncio.sleep(0.1)
    assert abandoned == 1
    watched = asyncio.create_task(group.call_watched(0, "waits", what="it", deadline_s=DEADLINE_S, patience_s=5))
    await asyncio.sleep(0)
    await group.call(0, "num_abandoned", deadline_s=DEADLINE_S)
    watched.cancel()
    for _ in range(100):
        if (abandoned := await group.call(0, "num_abandoned", deadline_s=DEADLINE_S)) == 2:
            break
        await asyncio.sleep(0.1)
    assert abandoned == 2 and watched.cancelled()
    assert -1 not in await group.call(0, "note", 60, deadline_s=DEADLINE_S), "it was never sent"


async def nothing_is_left_of_many_steps(group):
    """Groups that are trained on, that nobody asks for, whose call is given up: on either side."""
    for _ in range(NUM_STEPS):
        rolled = [group.submit(0, "group", 100, num_returns=2) for _ in range(NUM_GROUPS)]
        for _, size in rolled[2:]:
            await result(group, size)
        group.cancel(rolled[0][1])
        sizes = await group.call(1, "sizes", {"anywhere": [held for held, _ in rolled[2:]]}, deadline_s=DEADLINE_S)
        assert sizes == [100] * (NUM_GROUPS - 2)
        assert await num_held(group, 0) <= 2 * NUM_GROUPS
    del rolled, _
    gc.collect()
    await group.call_all("num_abandoned", deadline_s=DEADLINE_S)
    assert (await num_held(group, 0), await num_held(group, 1)) == (0, 0)
    for mailbox in (group.incarnation(0), group.incarnation(1)):
        assert len(mailbox._waiting) <= 1, "but the call that was waited for in vain"


async def a_death_fails_all_that_wait(group):
    held, size = group.submit(0, "group", 100, num_returns=2)
    await result(group, size)
    first = group.incarnation(0)
    waiting = [group.submit(0, "waits") for _ in range(3)]
    await group.call(0, "num_abandoned", deadline_s=DEADLINE_S)
    waiting += [group.submit(0, "dies"), group.submit(0, "waits")]
    for reference in waiting:
        with pytest.raises(ActorDied, match=r"store 0 died during it \(.*exit"):
            await result(group, reference)
    with pytest.raises(ActorDied, match="store 0 died during note"):
        await group.call(0, "note", 1, deadline_s=DEADLINE_S)
    lost = "store 1, sizes: LostValue: store 0, which held a value that is needed here, has died"
    with pytest.raises(ActorError, match=lost):
        await group.call(1, "sizes", {"anywhere": [held]}, deadline_s=DEADLINE_S)
    await group.replace(0, seen=first, deadline_s=DEADLINE_S)
    assert await group.call(0, "note", 7, deadline_s=DEADLINE_S) == [7]
    with pytest.raises(ActorError, match=lost):
        await group.call(1, "sizes", {"anywhere": [held]}, deadline_s=DEADLINE_S)
