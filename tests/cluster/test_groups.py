"""A cluster that others started: a call ends in a value or in one line, or is cancelled where it runs; an actor has the
handle of another; one that has died is replaced."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from flux_ray.cluster.group import Actor, ActorDied, ActorError, all_within
from flux_ray.cluster.plan import Plan, Role
from flux_ray.errors import UserError

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

DEADLINE_S = 60


class Store:
    def __init__(self, name: str = "", fails: Callable[[], None] | None = None) -> None:
        if fails is not None:
            fails()
        self.name = name
        self.waiting = self.abandoned = 0
        self.notes: list[int] = []

    def named(self) -> str:
        return self.name

    async def waits(self) -> None:
        self.waiting += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.abandoned += 1
            raise

    async def counts(self) -> tuple[int, int]:
        """Calls of `waits` that have begun, and those of them that were cancelled."""
        return self.waiting, self.abandoned

    def note(self, number: int) -> list[int]:
        self.notes.append(number)
        return self.notes

    def thread_after(self, seconds: float) -> int:
        time.sleep(seconds)
        return threading.get_ident()

    async def loop_thread(self) -> int:
        return threading.get_ident()

    async def blocks(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251

    def says(self, text: str) -> None:
        print(text)

    def breaks(self) -> None:
        raise KeyError("no such thing")

    def breaks_strangely(self) -> None:
        class Local(Exception):
            def __reduce__(self):
                raise TypeError("it doesn't travel")

        raise Local("as it is")

    async def cancels_itself(self) -> None:
        raise asyncio.CancelledError("by its own wish")

    def refuses(self) -> None:
        raise UserError("data.jsonl, row 3: no answer")

    def dies(self) -> None:
        os._exit(3)

    async def asks(self, other: Actor[Store], method: Callable[..., Any], *args: Any) -> Any:
        return await other.call(method, *args).within(DEADLINE_S)


def gives_up() -> None:
    raise TimeoutError("the hub did not answer")


def finds_a_mistake() -> None:
    raise UserError("model.path: no such model")


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no other process can import this file
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(ray, tmp_path_factory):
    """A cluster with two stores; each test leaves two that live."""
    from flux_ray.cluster.groups import Cluster

    logs = tmp_path_factory.mktemp("logs")
    cluster = Cluster(log_dir=logs, plugins=[])
    cluster.connect(None, cpus=2)
    role = Role("store", count=2, cpus=0.5, gpus=0.0)
    try:
        await cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=DEADLINE_S)
        group = cluster.spawn(role, env={})
        await group.build(Store, [{"name": "first"}, {"name": "second"}], deadline_s=DEADLINE_S)
        yield SimpleNamespace(cluster=cluster, group=group, logs=logs)
    finally:
        await asyncio.wait_for(cluster.close(), DEADLINE_S)


@pytest.fixture
def group(started):
    return started.group


async def counts_of(actor):
    return await actor.call(Store.counts).within(DEADLINE_S)


async def until(actor, counts):
    """Waits until so many of the actor's calls of `waits` have begun, and so many were cancelled."""
    for _ in range(200):
        if (seen := await counts_of(actor)) == counts:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{seen} and not {counts}")


async def test_each_object_is_built_from_its_own_arguments(group):
    assert (len(group), group.role) == (2, "store")
    assert await all_within([actor.call(Store.named) for actor in group], DEADLINE_S) == ["first", "second"]
    assert [(actor.role, actor.index) for actor in group] == [("store", 0), ("store", 1)]
    assert group[0].incarnation != group[1].incarnation
    address, port = await group.address(0, deadline_s=DEADLINE_S)
    assert address.count(".") == 3 and port > 0


async def test_plain_methods_take_turns_in_one_thread_and_the_loop_answers_meanwhile(group):
    slow, after = group[0].call(Store.thread_after, 1.0), group[0].call(Store.thread_after, 0.0)
    loop_thread = await group[0].call(Store.loop_thread).within(0.9, what="an answer while a method runs")
    assert await group[0].ping(DEADLINE_S)
    first, second = await all_within([slow, after], DEADLINE_S)
    assert first == second != loop_thread


async def test_a_failure_is_one_line(group, started):
    with pytest.raises(ActorError, match=r"^store 0, breaks: KeyError: 'no such thing'$") as failed:
        await group[0].call(Store.breaks).within(DEADLINE_S)
    assert "in breaks" in str(failed.value.__cause__), "the actor's own traceback"
    assert (failed.value.role, failed.value.index) == ("store", 0)
    assert failed.value.log_file == started.logs / "store-0.log"
    assert not isinstance(failed.value, ActorDied)
    with pytest.raises(ActorError, match=r"^store 1, a look at it: KeyError: 'no such thing'$"):
        await group[1].call(Store.breaks).within(DEADLINE_S, what="a look at it")
    with pytest.raises(ActorError, match=r"^store 0, breaks_strangely: Local: as it is$"):
        await group[0].call(Store.breaks_strangely).within(DEADLINE_S)
    with pytest.raises(ActorError, match=r"^store 0, cancels_itself: CancelledError: by its own wish$"):
        await group[0].call(Store.cancels_itself).within(DEADLINE_S)
    with pytest.raises(UserError, match=r"^data.jsonl, row 3: no answer$"):
        await group[0].call(Store.refuses).within(DEADLINE_S)


async def test_the_first_of_several_that_fails_is_told_at_once_and_the_others_are_cancelled(group):
    began, abandoned = await counts_of(group[0])
    waits = group[0].call(Store.waits)
    await until(group[0], (began + 1, abandoned))
    with pytest.raises(ActorError, match="store 1, breaks: KeyError"):
        await all_within([waits, group[1].call(Store.breaks)], DEADLINE_S)
    await until(group[0], (began + 1, abandoned + 1))


async def test_an_object_that_cannot_be_built_is_told_as_one_line(started):
    role = Role("broken", count=1, cpus=0.5, gpus=0.0)
    await started.cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=DEADLINE_S)
    broken = started.cluster.spawn(role, env={})
    with pytest.raises(ActorError, match=r"^broken 0, start: TimeoutError: the hub did not answer$"):
        await broken.build(Store, [{"fails": gives_up}], deadline_s=DEADLINE_S)
    with pytest.raises(UserError, match=r"^model.path: no such model$"):
        await broken.build(Store, [{"fails": finds_a_mistake}], deadline_s=DEADLINE_S)


async def test_who_does_not_answer_in_time_is_told_with_its_log_and_the_call_is_cancelled(group):
    began, abandoned = await counts_of(group[0])
    with pytest.raises(TimeoutError, match=r"^store 0 did not finish waits within 0.5 s; its log: .*store-0.log$"):
        await group[0].call(Store.waits).within(0.5)
    await until(group[0], (began + 1, abandoned + 1))


async def test_whoever_is_cancelled_while_waiting_cancels_the_call(group):
    began, abandoned = await counts_of(group[0])
    waiting = asyncio.create_task(group[0].call(Store.waits).within(DEADLINE_S))
    await until(group[0], (began + 1, abandoned))
    waiting.cancel()
    await until(group[0], (began + 1, abandoned + 1))
    assert waiting.cancelled()


async def test_a_call_is_cancelled_where_it_runs_and_one_that_has_not_begun_never_does(group):
    began, abandoned = await counts_of(group[0])
    waiting = group[0].call(Store.waits)
    await until(group[0], (began + 1, abandoned))
    busy = group[0].call(Store.thread_after, 1.0)
    await asyncio.sleep(0.3)
    never = group[0].call(Store.note, -1)
    await asyncio.sleep(0.2)
    for call in (never, waiting):
        call.cancel()
    await until(group[0], (began + 1, abandoned + 1))
    await busy.within(DEADLINE_S)
    assert -1 not in await group[0].call(Store.note, 60).within(DEADLINE_S)
    never.cancel()  # a second time, or when it is over, does nothing
    busy.cancel()


async def test_an_actor_calls_another(group):
    """By a handle that it was given, and what fails there is told as whose it was."""
    first, second = group[0], group[1]
    assert await first.call(Store.asks, second, Store.named).within(DEADLINE_S) == "second"
    assert await first.call(Store.asks, second, Store.note, 5).within(DEADLINE_S) == [5]
    with pytest.raises(ActorError, match=r"^store 1, breaks: KeyError: 'no such thing'$") as failed:
        await first.call(Store.asks, second, Store.breaks).within(DEADLINE_S)
    assert (failed.value.role, failed.value.index) == ("store", 1)
    assert failed.value.log_file == second.log_file and "in breaks" in str(failed.value.__cause__)
    with pytest.raises(ActorError, match=r"^store 1, breaks_strangely: Local: as it is$"):
        await first.call(Store.asks, second, Store.breaks_strangely).within(DEADLINE_S)
    with pytest.raises(UserError, match=r"^data.jsonl, row 3: no answer$"):
        await first.call(Store.asks, second, Store.refuses).within(DEADLINE_S)


async def test_who_stops_waiting_for_an_actor_that_waits_for_another_cancels_both(group):
    first, second = group
    began, abandoned = await counts_of(second)
    waiting = asyncio.create_task(first.call(Store.asks, second, Store.waits).within(DEADLINE_S))
    await until(second, (began + 1, abandoned))
    waiting.cancel()
    await until(second, (began + 1, abandoned + 1))


async def test_calls_that_travel_together_end_as_others_do(group):
    store = group[1].together()
    assert (store.role, store.index, store.incarnation) == (group[1].role, 1, group[1].incarnation)
    began, abandoned = await counts_of(store)
    waits, named = store.call(Store.waits), store.call(Store.named)
    assert await named.within(DEADLINE_S) == "second", "it doesn't wait for what was called before"
    with pytest.raises(ActorError, match=r"^store 1, a look at it: KeyError: 'no such thing'$") as failed:
        await store.call(Store.breaks).within(DEADLINE_S, what="a look at it")
    assert "in breaks" in str(failed.value.__cause__) and failed.value.log_file == group[1].log_file
    with pytest.raises(UserError, match=r"^data.jsonl, row 3: no answer$"):
        await store.call(Store.refuses).within(DEADLINE_S)
    with pytest.raises(TimeoutError, match=r"^store 1 did not finish waits within 0.5 s; its log: .*store-1.log$"):
        await waits.within(0.5)
    await until(group[1], (began + 1, abandoned + 1))


async def test_a_process_that_is_blocked_does_not_answer_a_ping(group):
    blocked = group[0].call(Store.blocks, 3.0)
    await asyncio.sleep(0.5)  # it has begun by now
    assert not await group[0].ping(0.5)
    await blocked.within(DEADLINE_S)
    assert await group[0].ping(DEADLINE_S)


async def test_what_an_actor_prints_is_in_its_log(group, started):
    await group[1].call(Store.says, "a word of the second").within(DEADLINE_S)
    assert "a word of the second" in (started.logs / "store-1.log").read_text()
    assert "a word of the second" not in (started.logs / "store-0.log").read_text()


async def test_a_death_fails_all_that_wait_and_another_stands_in_the_place(group):
    first, other = group[0], group[1]
    died = asyncio.create_task(group.death(0))
    began, abandoned = await counts_of(first)
    waiting = [first.call(Store.waits) for _ in range(3)]
    asked = other.call(Store.asks, first, Store.waits)
    await until(first, (began + 4, abandoned))
    assert not died.done()
    waiting += [first.together().call(Store.waits), first.call(Store.dies), first.call(Store.waits)]
    for call in waiting:
        with pytest.raises(ActorDied, match=r"^store 0 died during it \(.*exit") as failed:
            await call.within(DEADLINE_S, what="it")
        assert failed.value.log_file == first.log_file and "\n" not in str(failed.value)
    with pytest.raises(ActorDied, match="store 0 died during waits") as failed:
        await asked.within(DEADLINE_S)
    assert (failed.value.role, failed.value.index) == ("store", 0), "whoever died, and not who asked it"
    with pytest.raises(ActorDied, match="store 0 died during note"):
        await first.call(Store.note, 1).within(DEADLINE_S)
    with pytest.raises(ActorDied, match="store 0 died"):
        await first.ping(DEADLINE_S)
    error = await asyncio.wait_for(died, DEADLINE_S)
    assert isinstance(error, ActorDied) and str(error).startswith("store 0 died (")
    await group.replace(0, deadline_s=DEADLINE_S)
    assert group[0].incarnation != first.incarnation and group[0].index == 0
    assert await group[0].call(Store.note, 7).within(DEADLINE_S) == [7]
    assert await group[0].call(Store.named).within(DEADLINE_S) == "first", "built from the same arguments"
    assert await other.call(Store.asks, group[0], Store.note, 8).within(DEADLINE_S) == [7, 8]


async def test_one_that_lives_is_ended_when_it_is_replaced_and_its_handle_is_of_no_use(group):
    old, died = group[1], asyncio.create_task(group.death(1))
    replaced = asyncio.create_task(group.replace(1, deadline_s=DEADLINE_S))
    await asyncio.sleep(0)
    with pytest.raises(ActorDied, match="store 1 died"):
        await group[1].call(Store.named).within(DEADLINE_S)
    await replaced
    assert isinstance(await asyncio.wait_for(died, DEADLINE_S), ActorDied)
    with pytest.raises(ActorDied, match="store 1 died"):
        await old.call(Store.named).within(DEADLINE_S)
    assert await group[1].call(Store.named).within(DEADLINE_S) == "second"


async def test_a_plan_that_cannot_be_placed_is_refused_with_what_there_is(ray, tmp_path):
    from flux_ray.cluster.groups import Cluster

    cluster = Cluster(log_dir=tmp_path, plugins=[])
    cluster.connect(None, cpus=2)
    role = Role("giant", count=2, cpus=64.0, gpus=0.0)
    try:
        with pytest.raises(UserError, match=r"^giant: no place for a group of 2 x \(64 CPU\) within 1 s; the run asks "
                                            r"for 128 CPU, the cluster has 2 CPU, of which "):
            await cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=1)
    finally:
        await asyncio.wait_for(cluster.close(), DEADLINE_S)


async def test_a_cluster_that_was_there_before_is_left_as_it_was(ray, tmp_path):
    from flux_ray.cluster.groups import Cluster

    cluster = Cluster(log_dir=tmp_path, plugins=[])
    cluster.connect(None, cpus=2)
    role = Role("guest", count=1, cpus=0.5, gpus=0.0)
    await cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=DEADLINE_S)
    group = cluster.spawn(role, env={})
    await group.build(Store, [{}], deadline_s=DEADLINE_S)
    await asyncio.wait_for(cluster.close(), DEADLINE_S)
    assert ray.is_initialized()
    with pytest.raises(ActorDied, match="guest 0 died"):
        await group[0].call(Store.named).within(DEADLINE_S)
