"""Values that stay in the process that made them, and the handles by which others get them.

Takes:  what a call leaves (a group, log-probs …), and handles anywhere in the arguments of later calls.
Gives:  `Held`, the handle; `Shelf`, an actor's end: it keeps values, and brings those of other actors.
Knows:  what is asked of one actor at the same moment is asked in one call; values go from actor to actor, by Ray's
        object store where they are large.
Never:  keeps a value whose handle is gone from the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

FETCH_AT_ONCE = 64  # values in one answer: a batch of long groups must not be one object in the store
FETCH_DEADLINE_S = 600.0  # of one answer; the call that needs it has a deadline of its own


class LostValue(RuntimeError):
    """A value can't be had any more: its text names the actor that held it."""


class Held:
    """The handle of a value that `box` made in its call `number`. The driver's own is what keeps the value alive."""

    __slots__ = ("box", "mailbox", "number")

    def __init__(self, box: str, number: int, mailbox: Any = None) -> None:
        self.box, self.number, self.mailbox = box, number, mailbox  # the driver's end of `box`

    def __reduce__(self) -> tuple[type[Held], tuple[str, int]]:
        return Held, (self.box, self.number)

    def __del__(self) -> None:
        if self.mailbox is not None:
            self.mailbox.forget(self.number)


def held_in(value: Any) -> Iterator[Held]:
    """The handles in nested lists, tuples and dicts."""
    if isinstance(value, Held):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from held_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from held_in(item)


def put_in(value: Any, values: Iterator[Any]) -> Any:
    """The same, with `values` in the places of its handles, in the order of `held_in`."""
    if isinstance(value, Held):
        return next(values)
    if isinstance(value, (list, tuple)):
        return type(value)(put_in(item, values) for item in value)
    if isinstance(value, dict):
        return {key: put_in(item, values) for key, item in value.items()}
    return value


@dataclass
class Shelf:
    """What an actor holds, by box and number, and the other actors, by their boxes."""

    peers: dict[str, Any] = field(default_factory=dict)
    _values: dict[tuple[str, int], Any] = field(default_factory=dict)
    _wanted: dict[str, list[tuple[int, asyncio.Future[Any]]]] = field(default_factory=dict)
    _bringing: set[asyncio.Task[None]] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, box: str, number: int, value: Any) -> None:
        self._values[box, number] = value

    def forget(self, box: str, number: int) -> None:
        self._values.pop((box, number), None)

    def those(self, box: str, numbers: list[int]) -> dict[int, Any]:
        """By number, those of them that are here."""
        return {number: self._values[box, number] for number in numbers if (box, number) in self._values}

    async def resolved(self, arguments: Any) -> Any:
        """With the values in the places of all handles; LostValue where one can't be had."""
        handles = list(held_in(arguments))
        if not handles:
            return arguments
        return put_in(arguments, iter(await asyncio.gather(*map(self._get, handles))))

    async def _get(self, held: Held) -> Any:
        key = (held.box, held.number)
        if key in self._values:
            return self._values[key]
        if held.box not in self._wanted:
            self._wanted[held.box] = []
            asyncio.get_running_loop().call_soon(self._ask, held.box)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._wanted[held.box].append((held.number, answer))
        return await answer

    def _ask(self, box: str) -> None:
        wanted = self._wanted.pop(box)
        for first in range(0, len(wanted), FETCH_AT_ONCE):
            task = asyncio.get_running_loop().create_task(self._bring(box, wanted[first : first + FETCH_AT_ONCE]))
            self._bringing.add(task)
            task.add_done_callback(self._bringing.discard)

    async def _bring(self, box: str, wanted: list[tuple[int, asyncio.Future[Any]]]) -> None:
        lost, given = "has forgotten it", {}
        try:
            async with asyncio.timeout(FETCH_DEADLINE_S):
                given = await self.peers[box].fetch.remote(box, [number for number, _ in wanted])
        except ray.exceptions.RayActorError:
            lost = "has died"
        except TimeoutError:
            lost = f"did not give it within {FETCH_DEADLINE_S:g} s"
        except Exception as error:
            lost = f"could not give it: {type(error).__name__}: {error}"
        for number, answer in wanted:
            if answer.done():  # the call that wanted it is cancelled
                continue
            if number in given:
                answer.set_result(given[number])
            else:
                answer.set_exception(LostValue(f"{name_of(box)}, which held a value that is needed here, {lost}"))


def name_of(box: str) -> str:
    """The actor's role and index: what a box begins with."""
    return box.rpartition("#")[0]

