"""Both ends of an actor's mail, joined in this process by letters that somebody carries."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flux_ray.cluster.mail import GATHER_S, Call, CallFailed, Inbox, Letter, Mailbox

pytestmark = pytest.mark.unit


class Carried:
    """Stands in for an actor's handle: its letters come out here, each with the answer to be given by hand."""

    def __init__(self) -> None:
        self.post = self
        self.letters: asyncio.Queue[tuple[Letter, asyncio.Future[Any]]] = asyncio.Queue()

    def options(self, **_: Any) -> Carried:
        return self

    def remote(self, letter: Letter) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        self.letters.put_nowait((letter, answer))
        return answer

    async def next(self) -> tuple[Letter, asyncio.Future[Any]]:
        return await asyncio.wait_for(self.letters.get(), 10)


async def test_what_is_called_together_is_one_letter_and_what_is_left_waits_in_another():
    actor = Carried()
    mailbox = Mailbox(actor, "store 0")
    first, second, third = (mailbox.submit("work", (i,), {}) for i in range(3))
    letter, answer = await actor.next()
    assert [call.args for call in letter.calls] == [(0,), (1,), (2,)] and letter.waits
    answer.set_result([(second.number, "done"), (first.number, CallFailed("KeyError", "no", "", False))])
    assert await second == "done"
    with pytest.raises(CallFailed):
        await first
    letter, answer = await actor.next()
    assert letter.calls == [] and letter.waits, "nothing to say, but something to wait for"
    answer.set_exception(RuntimeError("it died"))
    with pytest.raises(RuntimeError, match="it died"):
        await third
    await asyncio.sleep(4 * GATHER_S)
    assert actor.letters.empty(), "nothing is left to wait for"


async def test_the_news_that_a_value_is_not_needed_goes_with_the_next_letter():
    holder, user = Carried(), Carried()
    mailbox, other = Mailbox(holder, "store 0"), Mailbox(user, "store 1")
    reference = mailbox.submit("work", (), {}, keeps=True)
    held = mailbox.held(reference)
    number, box = held.number, held.box
    using = other.submit("use", ({"anywhere": [held]},), {})
    del held
    used, of_user = await user.next()
    assert used.peers == {box: holder}, "who is to fetch it is told from whom"
    _, of_holder = await holder.next()
    of_holder.set_result([(reference.number, 1)])
    await reference
    mailbox.submit("more", (), {})
    assert (await holder.next())[0].forgotten == [], "it is an argument of a call that runs"
    del used
    of_user.set_result([(using.number, None)])
    await using
    mailbox.submit("more", (), {})
    assert (await holder.next())[0].forgotten == [number]


async def test_letters_are_opened_in_the_order_in_which_they_were_written():
    inbox = Inbox()
    letters = [Letter("store 0#1", order, True, [], [], [], {}) for order in range(4)]
    assert [list(inbox.in_order(letters[i])) for i in (1, 2, 0, 3)] == [[], [], letters[:3], letters[3:]]


async def test_a_call_that_is_cancelled_before_it_begins_leaves_nothing_behind():
    inbox = Inbox()
    ran = []

    async def work():
        ran.append(True)

    call = Call(0, "a", (), {}, False)
    inbox.unwanted.add(0)
    inbox.begin(call, work())
    inbox.running[0].cancel()
    ((number, result),) = await asyncio.wait_for(inbox.results(), 10)
    assert number == 0 and isinstance(result, CallFailed) and not ran
    assert not inbox.running and not inbox.unwanted and not +inbox._methods


async def test_results_of_one_method_are_one_answer_and_the_last_of_it_waits_for_none():
    inbox = Inbox()
    answers = [asyncio.ensure_future(inbox.results()) for _ in range(2)]
    done = asyncio.Event()
    calls = [Call(number, method, (), {}, False) for number, method in enumerate(["a", "a", "a", "b"])]
    for call in calls:
        inbox.begin(call, asyncio.wait_for(done.wait(), 10))  # type: ignore[arg-type]
    inbox.end(calls[0], 0)
    inbox.end(calls[1], 1)
    assert await answers[0] == [(0, 0), (1, 1)]
    inbox.end(calls[3], 3)
    await asyncio.sleep(0)
    assert answers[1].done() and answers[1].result() == [(3, 3)]
    done.set()
