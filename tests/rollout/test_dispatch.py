"""Who goes first, and where: older, then longer; the emptiest engine that has room; a group's parts keep its seeds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from flux_ray.config import from_dict
from flux_ray.driver.rolling import Rolling
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import Dispatch, Lengths, Request, split

pytestmark = pytest.mark.unit


def request(*, born=0, num_samples=1, prompt=10, response=100.0) -> Request:
    return Request(born, num_samples, prompt, response)


async def order_of(dispatch: Dispatch, requests: list[Request]) -> list[tuple[int, int]]:
    """(index of the request, its engine) as they start; each is done before another can take its place."""
    started: list[tuple[int, int]] = []

    async def one(index: int) -> None:
        async with dispatch.turn(requests[index]) as engine:
            started.append((index, engine))
            await asyncio.sleep(0.001)

    await asyncio.gather(*(one(index) for index in range(len(requests))))
    return started


async def test_older_goes_first_then_longer_then_the_longer_prompt():
    requests = [request(born=1, response=900), request(response=50), request(response=70),
                request(response=50, prompt=30)]
    started = await order_of(Dispatch(1, room=1), [request(num_samples=2), *requests])
    assert [index for index, _ in started] == [0, 3, 4, 2, 1]


async def test_a_burst_is_put_in_order_before_anyone_starts():
    requests = [request(response=r) for r in (10, 40, 20, 30)]
    assert [index for index, _ in await order_of(Dispatch(1, room=8), requests)] == [1, 3, 2, 0]


async def test_the_emptiest_engine_that_has_room_and_the_lowest_among_equals():
    requests = [request(response=r, num_samples=2) for r in (90, 80, 20, 10)]
    started = await order_of(Dispatch(2, room=2), requests)
    assert [engine for _, engine in started] == [0, 1, 1, 0]


async def test_nobody_starts_on_a_full_engine_and_a_group_larger_than_an_engine_starts_alone():
    dispatch, running, most = Dispatch(2, room=4), 0, 0

    async def one(n: int) -> None:
        nonlocal running, most
        async with dispatch.turn(request(num_samples=n)):
            running += n
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= n

    await asyncio.gather(*(one(n) for n in [3, 5] * 10))
    assert most <= 2 * 8
    await asyncio.wait_for(one(100), 5)


@pytest.mark.parametrize(("values", "room"), [
    ({}, 8), ({"driver.max_staleness": 1}, 8), ({"rollout.kv_after_update": "keep"}, 8),
    ({"rollout.kv_after_update": "keep", "driver.max_staleness": 1}, 4),
])
async def test_where_kv_is_kept_over_updates_nothing_waits_in_an_engine(values, room):
    config = from_dict({"rollout.max_num_seqs": 4, **values})
    dispatch, running, most = Rolling(config, SimpleNamespace(size=1))._dispatch, 0, 0

    async def one() -> None:
        nonlocal running, most
        async with dispatch.turn(request(num_samples=2)):
            running += 2
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 2

    await asyncio.gather(*(one() for _ in range(9)))
    assert most == room


async def test_who_is_cancelled_while_he_waits_or_runs_leaves_nothing_behind():
    dispatch = Dispatch(1, room=1)

    async def hold() -> None:
        async with dispatch.turn(request(num_samples=2)):
            await asyncio.sleep(3600)

    tasks = [asyncio.create_task(hold()) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(await asyncio.wait_for(order_of(dispatch, [request(num_samples=2)] * 2), 5)) == 2


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
