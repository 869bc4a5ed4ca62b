"""Users' code in a child: a call that blocks, raises, exits or asks concerns itself alone; a child ends as a tree."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest
import pytest_asyncio

from flux_ray.cluster.group import CallFailed
from flux_ray.errors import UserError
from flux_ray.sandbox import Child, ChildEnded, Entry, warm_up

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
START_S = 60
ENTRY = Entry("tests.sandbox.handlers:make", {})


async def nothing(payload):
    raise AssertionError("nobody asks")


@pytest_asyncio.fixture
async def child():
    warm_up(["tests.sandbox.handlers"])
    child = await Child.start(ENTRY, deadline_s=START_S)
    yield child
    child.kill("the test has ended")


async def test_calls_run_side_by_side_and_one_that_blocks_holds_up_no_other(child):
    blocked = asyncio.create_task(child.call(["blocks", 3], answer=nothing))
    await asyncio.sleep(0.1)
    start_s = time.monotonic()
    assert await child.call(["echo", {"a": [1]}], answer=nothing) == {"a": [1]}
    assert time.monotonic() - start_s < 2 and not blocked.done()
    assert await blocked == "blocked"


async def test_a_call_may_run_in_the_main_thread(child):
    assert await child.call("x", answer=nothing, in_main_thread=True) == {"is_main": True, "payload": "x"}


async def test_a_call_asks_its_own_answerer_and_what_that_raises_fails_the_call(child):
    async def doubled(number):
        return 2 * number

    async def refuses(number):
        raise OSError("the engine is gone")

    assert await child.call(["asks", 3], answer=doubled) == [0, 2, 4]
    with pytest.raises(OSError, match="the engine is gone"):
        await child.call(["asks", 3], answer=refuses)
    assert await child.call(["asks", 1], answer=doubled) == [0]


async def test_what_a_call_raises_is_told_with_its_traceback(child):
    with pytest.raises(CallFailed) as failed:
        await child.call(["raises"], answer=nothing)
    assert (failed.value.name, failed.value.text) == ("KeyError", "'no such thing'")
    assert "in raises" in str(failed.value)
    with pytest.raises(TypeError, match="type object"):
        await child.call(["echo", object()], answer=nothing)
    assert not child.ended


async def test_a_child_that_exits_fails_the_calls_that_run_in_it(child):
    running = asyncio.create_task(child.call(["blocks", 60], answer=nothing))
    await asyncio.sleep(0.2)
    with pytest.raises(ChildEnded, match="the process in which it ran exited with 3"):
        await child.call(["exits", 3], answer=nothing)
    with pytest.raises(ChildEnded):
        await running
    with pytest.raises(ChildEnded):
        await child.call(["echo", 1], answer=nothing)


async def test_a_child_is_killed_with_all_that_it_started(child):
    started: list[int] = []

    async def note(pid):
        started.append(pid)

    running = asyncio.create_task(child.call(["spawns"], answer=note))
    for _ in range(100):
        if started:
            break
        await asyncio.sleep(0.1)
    grandchild = psutil.Process(started[0])
    child.kill("it took too long")
    with pytest.raises(ChildEnded, match="it took too long"):
        await running
    gone, _ = psutil.wait_procs([grandchild], timeout=10)
    assert gone


async def test_an_entry_that_fails_is_told(child):
    with pytest.raises(UserError, match="no such function"):
        await Child.start(Entry(ENTRY.function, {"refuses": True}), deadline_s=START_S)
