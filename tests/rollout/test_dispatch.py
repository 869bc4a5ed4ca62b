"""Who goes first, and where: older, then longer; the emptiest engine that has room; a group's parts keep its seeds."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flux_ray.cluster.supervisor import OnDeath, Supervisor
from flux_ray.config import Config, from_dict
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.engines import Engines
from flux_ray.driver.entry import Entry
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.stages import Stages
from flux_ray.driver.staleness import Bound
from flux_ray.messages import Assignment, News, Orders, PartGenerated
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import Dispatch, Lengths, Request, split
from tests.fakes.actors import LocalGroup

pytestmark = pytest.mark.unit


def request(*, born=0, num_samples=1, prompt=10, response=100.0) -> Request:
    return Request(born, num_samples, prompt, response)


def order_of(dispatch: Dispatch, requests: list[Request]) -> list[tuple[int, int]]:
    """(index of the request, its engine) as they start; each is done before another can take its place."""
    for index, one in enumerate(requests):
        dispatch.ask(index, one)
    started: list[tuple[int, int]] = []
    running: deque[int] = deque()
    while True:
        for index, one, engine in dispatch.starts():
            assert one is requests[index]
            started.append((index, engine))
            running.append(index)
        if not running:
            assert len(started) == len(requests), "nobody is forgotten"
            return started
        dispatch.done(running.popleft())


def test_older_goes_first_then_longer_then_the_longer_prompt():
    requests = [request(born=1, response=900), request(response=50), request(response=70),
                request(response=50, prompt=30)]
    started = order_of(Dispatch(1, capacity=1), [request(num_samples=2), *requests])
    assert [index for index, _ in started] == [0, 3, 4, 2, 1]


def test_a_burst_is_put_in_order_before_anyone_starts():
    requests = [request(response=r) for r in (10, 40, 20, 30)]
    assert [index for index, _ in order_of(Dispatch(1, capacity=8), requests)] == [1, 3, 2, 0]


def test_among_equals_the_first_that_asked_goes_first():
    started = order_of(Dispatch(1, capacity=1), [request() for _ in range(6)])
    assert [index for index, _ in started] == [*range(6)]


def test_the_emptiest_engine_that_has_room_and_the_lowest_among_equals():
    requests = [request(response=r, num_samples=2) for r in (90, 80, 20, 10)]
    started = order_of(Dispatch(2, capacity=2), requests)
    assert [engine for _, engine in started] == [0, 1, 1, 0]


def test_nobody_starts_on_a_full_engine_and_a_group_larger_than_an_engine_starts_alone():
    dispatch, running, most = Dispatch(2, capacity=4), {}, 0
    sizes = dict(enumerate([3, 5] * 10)) | {20: 100}
    for key, n in sizes.items():
        dispatch.ask(key, request(born=key == 20, num_samples=n))
    while True:
        for key, one, engine in dispatch.starts():
            on_engine = [other for other, place in running.items() if place == engine]
            assert key != 20 or not on_engine, "the large one waits for an empty engine"
            running[key] = engine
            if key != 20:
                most = max(most, one.num_samples + sum(sizes[other] for other in on_engine))
        if not running:
            break
        gone = next(iter(running))
        dispatch.done(gone)
        del running[gone], sizes[gone]
    assert most == 8 and not sizes, "all of them have started"


def test_who_gives_up_while_he_waits_or_runs_leaves_nothing_behind():
    dispatch = Dispatch(1, capacity=1)
    for key in "abc":
        dispatch.ask(key, request(num_samples=2))
    assert [key for key, *_ in dispatch.starts()] == ["a"]
    tokens = [dispatch.done(key) for key in "cab"]
    assert tokens == [0, 210, 0], "what was expected of those that ran"
    assert len(order_of(dispatch, [request(num_samples=2)] * 2)) == 2


def test_a_request_is_done_once_and_may_be_asked_for_again():
    dispatch = Dispatch(1, capacity=1)
    for _ in range(2):
        dispatch.ask("a", request(num_samples=2))
        assert [key for key, *_ in dispatch.starts()] == ["a"]
        assert [dispatch.done("a"), dispatch.done("a")] == [210, 0]
    assert len(order_of(dispatch, [request(num_samples=2)] * 2)) == 2


class Worker:
    """A rollout worker that notes its orders, and says what it is told to say."""

    def __init__(self, index: int) -> None:
        self.assigned: list[Assignment] = []
        self.forgotten: list[tuple[int, int]] = []
        self.to_say: asyncio.Queue[News] = asyncio.Queue()

    async def meet(self, members: Any) -> None: ...

    async def order(self, orders: Orders) -> None:
        self.assigned += orders.assignments
        self.forgotten += orders.forgotten

    async def news(self) -> list[News]:
        return [await self.to_say.get()]

    def part_is_there(self, part: Assignment) -> None:
        self.to_say.put_nowait(PartGenerated(*part.key, part.prompt.seed, part.prompt.num_samples))


@dataclass
class Staged:
    """The real stages, on one worker that generates nothing."""

    stages: Stages
    worker: Worker
    lengths: Lengths

    def generate(self, row: int = 0, *, later: bool = False, num_samples: int = 2) -> Entry:
        """`later`: its turn is after all others'."""
        entry, _ = self.stages.ledger.admit(0)
        prompt = Prompt(entry.uid, row, "", np.zeros(10, np.int32), {}, num_samples, seed=1000 * entry.uid)
        self.stages.generate(entry, prompt, priority=later, lengths=self.lengths)
        return entry

    @property
    def assigned(self) -> list[int]:
        return [assignment.prompt.uid for assignment in self.worker.assigned]


@contextlib.asynccontextmanager
async def staged(config: Config) -> AsyncIterator[Staged]:
    workers, supervisor = LocalGroup("rollout", Worker, 1), Supervisor(start_deadline_s=5)
    supervisor.add(workers, OnDeath.REPLACE, informed=True)
    await supervisor.begin()
    ledger = Ledger(Bound(100, 0), DropStats(config, total=0), num_parts=config.rollout.split_groups)
    engines = Engines(LocalGroup("engine", lambda index: None, config.rollout.num_engines), supervisor, None)
    stages = Stages(config, ledger, workers=workers, engines=engines, warn=lambda kind, text: None)
    async with asyncio.TaskGroup() as tasks:
        stages.begin(tasks)
        yield Staged(stages, workers[0].object, Lengths(config.rollout.max_tokens))
        stages.end()
    supervisor.close()


async def soon(true: Callable[[], bool]) -> None:
    """Until it holds."""
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never held")


async def test_all_that_are_asked_for_at_one_moment_are_put_in_order_before_any_of_them_starts():
    async with staged(from_dict({"rollout.group_size": 2})) as to:
        for row, tokens in enumerate((10, 40, 20, 30)):
            to.lengths.saw(row, tokens)
        to.generate(1, later=True)
        for row in range(4):
            to.generate(row)
        assert not to.worker.assigned, "it waits for those that ask at the same moment"
        await soon(lambda: len(to.assigned) == 5)
        assert to.assigned == [2, 4, 3, 1, 0], "older, then longer"


@pytest.mark.parametrize(("values", "room"), [
    ({}, 8), ({"driver.max_staleness": 1}, 8), ({"rollout.kv_after_update": "keep"}, 8),
    ({"rollout.kv_after_update": "keep", "driver.max_staleness": 1}, 4),
])
async def test_where_kv_is_kept_over_updates_nothing_waits_in_an_engine(values, room):
    async with staged(from_dict({"rollout.max_num_seqs": 4, **values})) as to:
        for _ in range(9):
            to.generate(num_samples=2)
        for done in range(9):
            runs = min(9, done + room // 2)  # as many as fit, in groups of two samples
            await soon(lambda runs=runs: len(to.assigned) == runs)
            await asyncio.sleep(0.005)
            assert len(to.assigned) == runs, "and no more"
            to.worker.part_is_there(to.worker.assigned[done])
        assert sorted(to.assigned) == [*range(9)]


async def test_a_group_that_is_forgotten_makes_room_whether_it_waits_or_runs():
    async with staged(from_dict({"rollout.max_num_seqs": 1})) as to:
        entries = [to.generate(num_samples=2) for _ in range(4)]
        await soon(lambda: to.assigned == [0])
        to.stages.forget([entries[0], entries[1]])
        await soon(lambda: to.assigned == [0, 2])
        assert to.worker.forgotten == [(0, 0)], "of the other no worker knows"
        to.worker.part_is_there(to.worker.assigned[0])   # it was on its way
        to.worker.part_is_there(to.worker.assigned[1])
        await soon(lambda: to.assigned == [0, 2, 3])
        assert entries[0].num_generated == 0 and entries[2].num_generated == 1


async def test_the_parts_of_a_group_go_to_engines_by_themselves_and_to_one_worker():
    async with staged(from_dict({"rollout.max_num_seqs": 1, "rollout.num_engines": 2, "rollout.split_groups": 3,
                                 "rollout.group_size": 6})) as to:
        to.generate(num_samples=6)
        await soon(lambda: len(to.assigned) == 2)
        await asyncio.sleep(0.005)
        to.worker.part_is_there(to.worker.assigned[1])
        await soon(lambda: len(to.assigned) == 3)
    parts = to.worker.assigned
    assert [part.engine for part in parts] == [0, 1, 1] and {part.group_size for part in parts} == {6}
    assert sorted(part.prompt.seed + i for part in parts for i in range(part.prompt.num_samples)) == [*range(6)]
    assert Counter(part.key for part in parts) == {(0, 0): 3}


def test_lengths_are_the_rows_own_then_those_of_all():
    lengths = Lengths(longest=256)
    assert lengths.expected(1) == 256
    lengths.saw(1, 40)
    lengths.saw(2, 80)
    assert (lengths.expected(1), lengths.expected(2), lengths.expected(3)) == (40, 80, 60)
    lengths.saw(1, 20)
    assert lengths.expected(1) == 30


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 50])
def test_every_sample_keeps_its_seed(num_parts):
    prompt = Prompt(3, 4, "1+2=", np.array([1, 2], np.int32), {}, num_samples=7, seed=1000)
    parts = split(prompt, num_parts)
    assert [part.seed + i for part in parts for i in range(part.num_samples)] == list(range(1000, 1007))
    assert len(parts) == min(num_parts, 7)
    assert max(p.num_samples for p in parts) - min(p.num_samples for p in parts) <= 1
    assert all(part.uid == 3 and part.row == 4 for part in parts)
