"""The supervisor: what a death does, who is told who is alive, and when the run can't go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from flux_ray.cluster.group import ActorDied, ActorError, Members
from flux_ray.cluster.supervisor import MOST_DEATHS, OnDeath, Supervisor
from tests.fakes.actors import LocalGroup

pytestmark = pytest.mark.unit

WORKER, RANK = "rollout", "trainer"  # one that is replaced, one whose death ends the run


class Told:
    """Notes who it was told is alive."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.members: list[Members] = []

    async def meet(self, members: Members) -> None:
        self.members.append(members)


@dataclass
class Watched:
    supervisor: Supervisor
    groups: dict[str, LocalGroup]
    events: list[tuple[str, int]] = field(default_factory=list)  # of the workers: lost and replaced, in their order

    def __getitem__(self, role: str) -> LocalGroup:
        return self.groups[role]

    def members_of(self, role: str, index: int) -> Members:
        """The last that the actor was told."""
        return self.groups[role][index].object.members[-1]

    async def is_replaced(self, count: int = 1) -> None:
        """Until so many workers have been."""
        await soon(lambda: sum(what == "replaced" for what, _ in self.events) == count)

    async def failure(self) -> Exception:
        async with asyncio.timeout(5):
            return await self.supervisor.failure


@contextlib.asynccontextmanager
async def watching(make: Callable[[int], Any] = Told, *, begin: bool = True) -> AsyncIterator[Watched]:
    """Two workers, as `make` makes them, and two ranks."""
    supervisor = Supervisor(start_deadline_s=5)
    groups = {WORKER: LocalGroup(WORKER, make, 2), RANK: LocalGroup(RANK, Told, 2)}
    watched = Watched(supervisor, groups)
    supervisor.add(groups[WORKER], OnDeath.REPLACE, informed=True)
    supervisor.add(groups[RANK], OnDeath.END_RUN, informed=True)
    supervisor.listen(WORKER, lost=lambda index: watched.events.append(("lost", index)),
                      replaced=lambda index: watched.events.append(("replaced", index)))
    if begin:
        await supervisor.begin()
    yield watched
    supervisor.close()


async def soon(true: Callable[[], bool]) -> None:
    """Until it holds."""
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never held")


async def test_everybody_who_is_informed_is_told_who_is_there_once_all_are_built():
    supervisor = Supervisor(start_deadline_s=5)
    informed, other = LocalGroup("informed", Told, 2), LocalGroup("other", Told, 1)
    supervisor.add(informed, OnDeath.END_RUN, informed=True)
    supervisor.add(other, OnDeath.END_RUN, informed=False)
    assert not informed[0].object.members
    await supervisor.begin()
    for actor in informed:
        (members,) = actor.object.members
        assert members.epoch == 1 and members.of("informed") == tuple(informed) and members.of("other") == tuple(other)
        assert members.incarnations == {one.incarnation for one in (*informed, *other)}
    assert not other[0].object.members
    supervisor.close()


async def test_a_death_that_ends_the_run_is_its_failure():
    async with watching() as watched:
        watched[RANK][1].kill()
        error = await watched.failure()
        assert isinstance(error, ActorDied) and str(error) == "trainer 1 died"
        assert (error.role, error.index) == (RANK, 1)
        assert watched.events == [] and watched.supervisor.members.epoch == 1, "nobody is replaced"


async def test_before_all_are_built_any_death_ends_the_run():
    async with watching(begin=False) as watched:
        dead = watched[WORKER][0]
        dead.kill()
        assert str(await watched.failure()) == "rollout 0 died"
        assert watched[WORKER][0] is dead and watched.events == []


async def test_an_actor_that_is_replaced_is_told_as_lost_and_then_as_replaced():
    async with watching() as watched:
        dead = watched[WORKER][1]
        dead.kill()
        await watched.is_replaced()
        assert watched.events == [("lost", 1), ("replaced", 1)]
        assert watched[WORKER][1] is not dead and watched[WORKER][1].incarnation != dead.incarnation
        assert not watched.supervisor.failure.done()


async def test_everybody_is_told_of_who_is_replaced_by_a_higher_epoch():
    """The new one too, and before anybody is told that it serves."""
    async with watching() as watched:
        known: list[Members] = []
        watched.supervisor.listen(WORKER, lost=lambda index: None, replaced=lambda index: known.extend(
            watched.members_of(role, i) for role in (WORKER, RANK) for i in range(2)))
        dead = watched[WORKER][0].incarnation
        watched[WORKER][0].kill()
        await soon(lambda: bool(known))
        for members in known:
            assert members.epoch == 2 and members.of(WORKER) == tuple(watched[WORKER])
            assert dead not in members.incarnations
        assert [members.epoch for members in watched[RANK][0].object.members] == [1, 2]
        assert [members.epoch for members in watched[WORKER][0].object.members] == [2]


async def test_two_that_die_at_once_are_both_replaced_and_the_last_epoch_has_both():
    async with watching() as watched:
        for actor in list(watched[WORKER]):
            actor.kill()
        await watched.is_replaced(2)
        assert sorted(watched.events) == [("lost", 0), ("lost", 1), ("replaced", 0), ("replaced", 1)]
        for rank in watched[RANK]:
            last = max(rank.object.members, key=lambda members: members.epoch)
            assert last.of(WORKER) == tuple(watched[WORKER])


async def test_an_actor_that_answers_nobody_is_ended_and_told_with_its_reason():
    async with watching() as watched:
        silent = watched[RANK][0]
        watched.supervisor.end_silent(RANK, 0, silent.incarnation, "trainer 0 did not answer for 60 s")
        error = await watched.failure()
        assert isinstance(error, ActorDied) and str(error) == "trainer 0 did not answer for 60 s"
        assert (error.role, error.index) == (RANK, 0) and not silent.alive


async def test_a_silent_actor_is_replaced_where_its_role_is_and_ended_once():
    async with watching() as watched:
        silent = watched[WORKER][0]
        for _ in range(2):   # two have waited for it in vain
            watched.supervisor.end_silent(WORKER, 0, silent.incarnation, "silent")
        assert not silent.alive
        await watched.is_replaced()
        watched.supervisor.end_silent(WORKER, 0, silent.incarnation, "silent")
        await asyncio.sleep(0.01)
        assert watched[WORKER][0].alive, "another stands there: it is not the one that was silent"
        assert watched.events == [("lost", 0), ("replaced", 0)]


async def test_the_reason_of_a_silent_actor_is_not_told_of_the_next_one():
    async with watching() as watched:
        watched.supervisor.end_silent(WORKER, 0, watched[WORKER][0].incarnation, "silent")
        await watched.is_replaced()
        for count in range(2, MOST_DEATHS + 1):
            watched[WORKER][0].kill()
            await watched.is_replaced(count)
        watched[WORKER][0].kill()
        assert str(await watched.failure()).startswith("rollout 0 died; ")


async def test_whoever_waits_for_another_in_its_place_is_woken():
    async with watching() as watched:
        dead = watched[WORKER][0]
        waiting = asyncio.ensure_future(watched.supervisor.replaced(WORKER, 0, dead.incarnation, 5))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        watched[WORKER][1].kill()
        await watched.is_replaced()
        assert not waiting.done(), "another was replaced"
        dead.kill()
        await waiting
        assert watched[WORKER][0].alive
        await watched.supervisor.replaced(WORKER, 0, dead.incarnation, 0.01)   # at once: it has been
        with pytest.raises(TimeoutError):
            await watched.supervisor.replaced(WORKER, 0, watched[WORKER][0].incarnation, 0.01)


class SlowToMeet(Told):
    """It takes its time to hear of others."""

    async def meet(self, members: Members) -> None:
        await asyncio.sleep(0.05)
        await super().meet(members)


@pytest.mark.parametrize("asks_after_s", [0.0, 0.02])
async def test_who_waits_for_a_replacement_goes_on_once_everybody_knows_of_it(asks_after_s):
    async with watching(SlowToMeet) as watched:
        dead = watched[WORKER][0]
        dead.kill()
        await asyncio.sleep(asks_after_s)
        await watched.supervisor.replaced(WORKER, 0, dead.incarnation, 5)
        for worker in watched[WORKER]:
            known = worker.object.members
            assert known and dead.incarnation not in known[-1].incarnations


async def test_what_dies_again_and_again_without_a_step_between_ends_the_run():
    async with watching() as watched:
        for count in range(1, MOST_DEATHS + 1):
            watched[WORKER][count % 2].kill()
            await watched.is_replaced(count)
        assert not watched.supervisor.failure.done()
        watched[WORKER][0].kill()
        error = await watched.failure()
        assert isinstance(error, ActorDied) and (error.role, error.index) == (WORKER, 0)
        assert str(error) == f"rollout 0 died; {MOST_DEATHS} have died since the last step"
        assert len(watched.events) == 2 * MOST_DEATHS, "it is not replaced"


async def test_a_step_between_lets_deaths_be_counted_anew():
    async with watching() as watched:
        for count in range(1, 3 * MOST_DEATHS):
            watched[WORKER][0].kill()
            await watched.is_replaced(count)
            if count % MOST_DEATHS == 0:
                watched.supervisor.progress()
        assert not watched.supervisor.failure.done()


class CanNotBeMadeAgain(Told):
    made = 0

    def __init__(self, index: int) -> None:
        super().__init__(index)
        CanNotBeMadeAgain.made += 1
        if CanNotBeMadeAgain.made > 2:
            raise OSError("no such file: tokenizer.json")


async def test_a_replacement_that_can_not_be_built_ends_the_run(monkeypatch):
    monkeypatch.setattr(CanNotBeMadeAgain, "made", 0)
    async with watching(CanNotBeMadeAgain) as watched:
        watched[WORKER][0].kill()
        error = await watched.failure()
        assert isinstance(error, OSError) and str(error) == "no such file: tokenizer.json"
        assert watched.events == [("lost", 0)]


class CanNotMeetAgain(Told):
    async def meet(self, members: Members) -> None:
        if members.epoch > 1 and not self.members:
            raise ValueError("no engine answers")
        await super().meet(members)


async def test_a_replacement_that_can_not_begin_ends_the_run():
    """A rollout worker asks the engines what they hold when it first meets them."""
    async with watching(CanNotMeetAgain) as watched:
        watched[WORKER][0].kill()
        error = await watched.failure()
        assert isinstance(error, ActorError) and "ValueError: no engine answers" in str(error)
        assert (error.role, error.index) == (WORKER, 0)
        assert watched.events == [("lost", 0)]


class DiesAsItMeets(Told):
    """The second of two dies of the news that the first was replaced."""

    async def meet(self, members: Members) -> None:
        if self.index == 1 and members.epoch == 2:
            members.of(WORKER)[1].kill()
            await asyncio.sleep(0)
        await super().meet(members)


async def test_one_that_dies_while_it_is_told_is_replaced_as_well():
    async with watching(DiesAsItMeets) as watched:
        watched[WORKER][0].kill()
        await watched.is_replaced(2)
        assert sorted(watched.events) == [("lost", 0), ("lost", 1), ("replaced", 0), ("replaced", 1)]
        assert not watched.supervisor.failure.done()
        assert max(m.epoch for m in watched[RANK][0].object.members) == 3


async def test_after_the_end_nobody_is_replaced():
    async with watching() as watched:
        watched.supervisor.close()
        await asyncio.sleep(0)
        watched[WORKER][0].kill()
        await asyncio.sleep(0.01)
        assert not watched[WORKER][0].alive and watched.events == [] and not watched.supervisor.failure.done()


@pytest.mark.parametrize("times", [1, 3, MOST_DEATHS + 1])
async def test_one_that_dies_while_it_starts_is_replaced_as_well(times, monkeypatch):
    async with watching() as watched:
        replace, left = watched[WORKER].replace, [times]

        async def dies_at_first(index: int, *, deadline_s: float) -> None:
            if left[0]:
                left[0] -= 1
                raise ActorDied(f"{WORKER} {index} died during start", role=WORKER, index=index)
            await replace(index, deadline_s=deadline_s)

        monkeypatch.setattr(watched[WORKER], "replace", dies_at_first)
        watched[WORKER][0].kill()
        if times > MOST_DEATHS:
            assert "died during start" in str(await watched.failure())
        else:
            await watched.is_replaced()
            assert watched.events == [("lost", 0), ("replaced", 0)] and not watched.supervisor.failure.done()


async def test_an_actor_that_is_to_be_ended_is_ended_whatever_looking_at_it_gives():
    def look_at(actor: object) -> None:
        raise OSError("nothing to be seen")

    async with watching() as watched:
        watched.supervisor.look_at = look_at
        standing = watched[WORKER][1]
        watched.supervisor.end_silent(WORKER, 1, standing.incarnation, "it stands still")
        assert "nothing to be seen" in str(await watched.failure()), "what nobody waits for is told all the same"
        await soon(lambda: not standing.alive)


async def test_once_the_run_fails_nobody_is_replaced():
    """Ray's own death ends it first, and without Ray an actor that dies meanwhile couldn't be replaced."""
    async with watching() as watched:
        watched.supervisor.fail(ActorDied("Ray's gcs_server died", role="ray", index=0))
        watched[WORKER][0].kill()
        await asyncio.sleep(0.01)
        assert watched.events == [] and watched.supervisor.is_whole
        assert str(await watched.failure()) == "Ray's gcs_server died"
