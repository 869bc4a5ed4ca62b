"""What a rollout worker owns, when the life of the run ends that has asked for it: nothing of it reaches the next."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from flux_ray.messages import PartLost
from flux_ray.rollout.owned import Carried, Owned

pytestmark = pytest.mark.unit

KEY = 7, 0


def news(why: str) -> PartLost:
    return PartLost(*KEY, 1, 0, "engine 0", why)


def carried() -> Carried:
    return Carried(SimpleNamespace(key=KEY, prompt=SimpleNamespace(where="row 8")))  # type: ignore[arg-type]


async def test_work_and_news_of_a_life_that_is_over_reach_no_other():
    owned, group = Owned(), carried()
    owned.carried[KEY] = group
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(name)

    owned.run(group, work("first part"), "rollout")
    owned.run(group, work("second part"), "rollout")
    del owned.carried[KEY]  # as where its first part was dropped
    owned.tell(news("of before"))
    await asyncio.sleep(0)
    await owned.let_go()
    assert sorted(ended) == ["first part", "second part"]
    owned.tell(news("of now"))
    assert [one.why for one in await owned.news()] == ["of now"]  # type: ignore[union-attr]


async def test_who_asked_for_news_before_takes_none_of_those_that_come_later():
    owned = Owned()
    before = asyncio.ensure_future(owned.news())
    await asyncio.sleep(0)
    await owned.let_go()
    owned.tell(news("of now"))
    assert len(await owned.news()) == 1
    before.cancel()
    assert not before.done()


async def test_it_waits_for_files_that_are_being_written_though_nobody_else_does():
    owned, may_end, written = Owned(), asyncio.Event(), []

    async def write() -> None:
        await may_end.wait()
        written.append("all")

    asking = asyncio.ensure_future(owned.to_its_end(write()))
    await asyncio.sleep(0)
    asking.cancel()
    letting_go = asyncio.ensure_future(owned.let_go())
    await asyncio.sleep(0.01)
    assert not letting_go.done()
    may_end.set()
    await letting_go
    assert written == ["all"]
