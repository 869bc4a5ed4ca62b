"""Calls that travel together, over a Line and a Desk of this process: which ones, in which order; their failures."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from flux_ray.cluster.group import ActorDied, ActorError, CallFailed
from flux_ray.cluster.together import Answer, Desk, Line, Lost, Sent

pytestmark = pytest.mark.unit

SOON_S = 5.0


class Over:
    """A line to a desk; it notes what each exchange took along, and fails all of them once `death` is set."""

    def __init__(self) -> None:
        self.desk, self.line = Desk(self.do), Line(self, self.exchange)
        self.gates: dict[int, asyncio.Event] = {}
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.taken: list[list[int]] = []
        self.death: Exception | None = None

    async def exchange(self, calls: list[Sent], given_up: list[int]) -> list[Answer]:
        if self.death:
            raise Lost from self.death
        self.taken.append([call.args[0] for call in calls])
        return await self.desk.exchange(calls, given_up)

    async def do(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        (number,) = args
        self.begun.append(number)
        try:
            await self.gates.setdefault(number, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        if number < 0:
            raise CallFailed.of(ValueError(f"no {number}"))
        return 10 * number

    def call(self, number: int) -> asyncio.Future[int]:
        self.gates[number] = asyncio.Event()
        return asyncio.ensure_future(self.line.call("double", (number,), {}).within(SOON_S))

    def died(self, error: BaseException, when: str) -> Exception:
        return ActorDied(f"made 3 died{when} ({error})", role="made", index=3)

    def failed(self, cause: BaseException, what: str) -> Exception:
        return cause.as_error("made", 3, what=what, log_dir=None)  # type: ignore[attr-defined]

    def late(self, what: str, deadline_s: float) -> TimeoutError:
        return TimeoutError(f"made 3: {what}, {deadline_s:g} s")


async def until(condition: Any) -> None:
    for _ in range(round(SOON_S / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it took too long")


async def test_calls_of_one_moment_go_in_one_exchange_and_begin_in_their_order():
    over = Over()
    calls = [over.call(number) for number in (1, 2, 3)]
    await until(lambda: len(over.begun) == 3)
    assert over.taken[0] == over.begun == [1, 2, 3]
    for gate in over.gates.values():
        gate.set()
    assert await asyncio.gather(*calls) == [10, 20, 30]
    assert sum(map(len, over.taken)) == 3


async def test_an_answer_does_not_wait_for_a_call_that_takes_longer():
    over = Over()
    slow, fast = over.call(1), over.call(2)
    await until(lambda: over.begun == [1, 2])
    over.gates[2].set()
    assert await fast == 20
    assert not slow.done()
    over.gates[1].set()
    assert await slow == 10


async def test_a_call_that_comes_later_does_not_wait_for_the_exchange_that_is_on_its_way():
    over = Over()
    first = over.call(1)
    await until(lambda: over.begun == [1])
    second = over.call(2)
    await until(lambda: over.begun == [1, 2])
    over.gates[2].set()
    assert await second == 20
    over.gates[1].set()
    assert await first == 10


async def test_what_a_call_raises_is_of_that_call_alone():
    over = Over()
    bad, good = over.call(-1), over.call(1)
    await until(lambda: len(over.begun) == 2)
    over.gates[-1].set()
    with pytest.raises(ActorError, match="made 3, double: ValueError: no -1"):
        await bad
    over.gates[1].set()
    assert await good == 10


async def test_whoever_waits_no_longer_ends_the_call_over_there():
    over = Over()
    given_up, other = over.call(1), over.call(2)
    await until(lambda: over.begun == [1, 2])
    given_up.cancel()
    await until(lambda: over.cancelled == [1])
    over.gates[2].set()
    assert await other == 20


async def test_a_deadline_names_the_call_and_ends_it():
    over = Over()
    over.gates[1] = asyncio.Event()
    with pytest.raises(TimeoutError, match=r"made 3: score of row 5, 0\.05 s"):
        await over.line.call("double", (1,), {}).within(0.05, what="score of row 5")
    await until(lambda: over.cancelled == [1])


async def test_a_death_ends_every_call_and_those_that_come_after_it():
    over = Over()
    calls = [over.call(1), over.call(2)]
    await until(lambda: over.begun == [1, 2])
    over.death = OSError("killed")
    calls.append(over.call(3))
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert str(result) == "made 3 died during double (killed)" and isinstance(result, ActorDied)
    with pytest.raises(ActorDied, match="made 3 died"):
        await over.line.call("double", (4,), {}).within(SOON_S)


async def test_nothing_is_on_its_way_once_all_are_answered():
    over = Over()
    call = over.call(1)
    await until(lambda: over.begun == [1])
    over.gates[1].set()
    await call
    num_exchanges = len(over.taken)
    await asyncio.sleep(0.05)
    assert len(over.taken) == num_exchanges and not over.line._tasks and over.line._due is None


async def test_what_is_still_waited_for_is_asked_for_again_when_two_exchanges_return_at_one_moment():
    both, sent = asyncio.Event(), []

    async def exchange(calls: list[Sent], given_up: list[int]) -> list[Answer]:
        sent.append([call.number for call in calls])
        if len(sent) > 2:
            return [(1, False, 10), (2, False, 20)]
        await both.wait()
        return []

    line = Line(Over(), exchange)
    first = asyncio.ensure_future(line.call("double", (1,), {}).within(SOON_S))
    await until(lambda: len(sent) == 1)
    second = asyncio.ensure_future(line.call("double", (2,), {}).within(SOON_S))
    await until(lambda: len(sent) == 2)
    both.set()
    assert await asyncio.gather(first, second) == [10, 20]
    assert sent == [[1], [2], []]


@pytest.mark.parametrize("seed", range(20))
async def test_every_call_ends_whenever_exchanges_and_answers_come(seed):
    """Exchanges and their returns take random times and overtake one another; some callers stop waiting."""
    chance, begun = random.Random(seed), []

    async def do(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        begun.append(args[0])
        await asyncio.sleep(chance.choice((0.0, 0.0, 0.005, chance.uniform(0.0, 0.03))))
        return 10 * args[0]

    desk = Desk(do)

    async def exchange(calls: list[Sent], given_up: list[int]) -> list[Answer]:
        await asyncio.sleep(chance.choice((0.0, 0.005, chance.uniform(0.0, 0.01))))
        answers = await desk.exchange(calls, given_up)
        await asyncio.sleep(chance.choice((0.0, 0.005, chance.uniform(0.0, 0.01))))
        return answers

    line = Line(Over(), exchange)

    async def caller(number: int) -> int | None:
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        try:
            call = line.call("double", (number,), {})
            return await call.within(0.004 if chance.random() < 0.2 else SOON_S)
        except TimeoutError:
            return None

    results = await asyncio.gather(*(caller(number) for number in range(100)))
    assert all(result in (None, 10 * number) for number, result in enumerate(results))
    assert sum(result is None for result in results) < 40, "only those that gave up"
    assert len(begun) == len(set(begun)), "none is carried out twice"
    await asyncio.sleep(0.1)
    assert not line._waiting and not line._tasks and not desk._tasks and not desk._answers


async def test_a_call_that_is_given_up_before_it_is_sent_is_never_carried_out():
    over = Over()
    kept, given_up = over.call(1), over.line.call("double", (2,), {})
    await asyncio.sleep(0)
    given_up.cancel()
    over.gates[1].set()
    assert await kept == 10
    assert over.begun == [1] and [number for calls in over.taken for number in calls] == [1]


async def test_a_call_that_overtakes_its_own_end_is_not_begun():
    over = Over()
    over.gates[1] = over.gates[2] = asyncio.Event()
    assert await over.desk.exchange([], [1]) == []
    assert not over.desk.is_idle, "it must know when the call comes"
    later = asyncio.ensure_future(over.desk.exchange([Sent(1, "double", (1,), {}), Sent(2, "double", (2,), {})], []))
    over.gates[1].set()
    assert await later == [(2, False, 20)] and over.begun == [2] and over.desk.is_idle


async def test_a_call_that_somebody_else_ends_over_there_is_told():
    over = Over()
    call = over.call(1)
    await until(lambda: over.begun == [1])
    over.desk._tasks[1].cancel()
    with pytest.raises(ActorError, match="made 3, double: CancelledError"):
        await call
    await until(lambda: over.desk.is_idle)
