"""One call of one reward function, with a deadline.

Takes:  a RewardFunction and its arguments, as TRL's GRPOTrainer passes them.
Gives:  one value a sample: a number, None, or a dict of these; RewardError names function, row, sample and cause.
Knows:  rules are called in a thread, one at a time; users' functions in child processes; reward models on this loop.
        A call is waited for `deadline_s` seconds from its turn on; Python can't end a thread: one that hangs stays.
Never:  runs users' code in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flux_ray.cluster.group import CallFailed
from flux_ray.reward.child import Call
from flux_ray.reward.registry import RewardFunction
from flux_ray.reward.sandboxed import Late, SandboxedRewards
from flux_ray.reward.values import BAD_RESULT, RAISED, TIMED_OUT, RewardError, Value, checked, own_arguments

#: Columns of the data that a function gets only where it names them: TRL leaves them out.
LEFT_OUT = frozenset({"prompt", "completion"})

Outcome = tuple[Any, BaseException | None]  # what a call gave, and None; or None, and what it raised

Ask = Callable[[], Awaitable[object]]  # asks a reward model


@dataclass(frozen=True)
class Arguments:
    """The keyword arguments of a call for `size` samples: what all have alike, lists of that length, TRL's own."""

    size: int
    same: Mapping[str, object]
    each: Mapping[str, Sequence[object]]
    state: Mapping[str, object]  # trainer_state's fields
    logged: dict[str, float] = field(default_factory=dict)  # by log_metric

    def of_sample(self, sample: int) -> Arguments:
        return replace(self, size=1, each={name: values[sample : sample + 1] for name, values in self.each.items()})

    @property
    def named(self) -> dict[str, object]:
        """TRL's own arguments."""
        return own_arguments(self.state, self.logged)


class Caller:
    def __init__(self, children: SandboxedRewards, *, deadline_s: float) -> None:
        self._children, self._deadline_s = children, deadline_s
        self._turn = asyncio.Lock()
        self._answered: Counter[str] = Counter()  # calls of each reward model

    async def call(
        self, function: RewardFunction, arguments: Arguments, *, where: str, model: Ask | None = None
    ) -> list[Value]:
        """The function's values, checked. RewardError says what went wrong; `where` names the prompt in it.

        `model`: asks the reward model that the function is. Where a function raises over the samples together, it is
        called once more for each alone, to tell which one it was.
        """
        who = f"reward {function.name}, {where}"
        result, error = await (self._of_model(function.name, model) if model is not None
                               else self._outcome(function, arguments, who))
        if isinstance(error, Late):
            raise RewardError(f"{who}: no value within reward.deadline_s={self._deadline_s:g}", TIMED_OUT)
        if isinstance(error, RewardError):
            raise error
        if error is not None:
            sample = f"{arguments.size} samples together"
            if model is None:
                sample = await self._guilty_sample(function, arguments, who)
            raise RewardError(f"{who}, {sample}: {_said(error)}", RAISED) from error
        return checked(result, arguments.size, who)

    async def _outcome(self, function: RewardFunction, arguments: Arguments, who: str) -> Outcome:
        """What the call gave or raised; Late where the deadline passed. It runs from the call's own turn on."""
        if function.in_child:
            return await self._in_child(function, arguments, who)
        assert function.call is not None
        call = functools.partial(function.call, **accepted(function, arguments))
        async with self._turn:
            running = asyncio.ensure_future(self._within_deadline(_in_thread(call)))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait({running})  # a thread can't be stopped: whoever is next waits for it all the same
                raise

    async def _in_child(self, function: RewardFunction, arguments: Arguments, who: str) -> Outcome:
        takes = functools.partial(_takes, function)
        payload: Call = {
            "reference": function.reference, "size": arguments.size, "who": who, "state": arguments.state,
            "same": {name: value for name, value in arguments.same.items() if takes(name)},
            "each": {name: values for name, values in arguments.each.items() if takes(name)},
            "named": [name for name in arguments.named if takes(name)], "options": function.options,
        }
        try:
            told = await self._children.call(payload, is_async=function.signature.is_async)
        except Exception as error:
            return None, error
        if "wrong" in told:
            return None, RewardError(told["wrong"], BAD_RESULT)
        arguments.logged.update(told["logged"])
        return told["values"], None

    async def _of_model(self, name: str, ask: Ask) -> Outcome:
        """It answers in the order in which it was asked: as long as it answers, a call waits its turn."""
        asking = asyncio.ensure_future(_outcome_of(ask))
        late = False
        try:
            while not (late or asking.done()):
                answered = self._answered[name]
                await asyncio.wait({asking}, timeout=self._deadline_s)
                late = not asking.done() and self._answered[name] == answered
        finally:
            asking.cancel()  # of no effect on one that is done
        if late:
            return None, Late()
        self._answered[name] += 1
        return asking.result()

    async def _within_deadline(self, future: asyncio.Future[Outcome]) -> Outcome:
        await asyncio.wait({future}, timeout=self._deadline_s)
        return future.result() if future.done() else (None, Late())

    async def _guilty_sample(self, function: RewardFunction, arguments: Arguments, who: str) -> str:
        for sample in range(arguments.size):
            _, error = await self._outcome(function, arguments.of_sample(sample), who)
            if isinstance(error, Late):
                break
            if error is not None:
                return f"sample {sample + 1} of {arguments.size}"
        return f"{arguments.size} samples together"


def _said(error: BaseException) -> str:
    return f"{error.name}: {error.text}" if isinstance(error, CallFailed) else f"{type(error).__name__}: {error}"


async def _outcome_of(ask: Ask) -> Outcome:
    try:
        return await ask(), None
    except Exception as error:
        return None, error


def _in_thread(call: Callable[[], object]) -> asyncio.Future[Outcome]:
    """A future of the call's outcome. The thread is a daemon: one that hangs must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def run() -> None:
        try:
            outcome: Outcome = (call(), None)
        except BaseException as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def accepted(function: RewardFunction, arguments: Arguments) -> dict[str, object]:
    """The arguments that the function's signature takes, its options among them."""
    same = {name: [value] * arguments.size for name, value in arguments.same.items()}
    given = {**arguments.named, **same, **arguments.each}
    return {name: value for name, value in given.items() if _takes(function, name)} | function.options


def _takes(function: RewardFunction, name: str) -> bool:
    """Whether it is called with that column, or what TRL gives by that name."""
    if name in function.parameters:
        return function.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in function.parameters.values())
    return takes_any and name not in LEFT_OUT
