"""One call of one reward function, with a deadline.

Takes:  a RewardFunction and its arguments, as TRL's GRPOTrainer passes them.
Gives:  one value a sample: a number, None, or a dict of these, and which samples failed; RewardError names function,
        row, sample and cause.
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
from flux_ray.reward.values import BAD_RESULT, RAISED, TIMED_OUT, RewardError, Value, checked, own_arguments, sorted_out

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


@dataclass(frozen=True)
class Judged:
    """What a function says of some samples."""

    values: list[Value]  # None for one that failed
    failed: dict[int, RewardError]  # by sample


class Caller:
    def __init__(self, children: SandboxedRewards, *, deadline_s: float, retries: int = 1) -> None:
        self._children, self._deadline_s, self._retries = children, deadline_s, retries
        self._turn = asyncio.Lock()
        self._answered: Counter[str] = Counter()  # calls of each reward model

    async def call(
        self, function: RewardFunction, arguments: Arguments, *, where: str, model: Ask | None = None
    ) -> list[Value]:
        """The function's values, checked. RewardError says what went wrong; `where` names the prompt in it.

        `model`: asks the reward model that the function is.
        """
        judged = await self.judge(function, arguments, where=where, model=model, stops=True)
        for error in judged.failed.values():
            raise error
        return judged.values

    async def judge(
        self, function: RewardFunction, arguments: Arguments, *, where: str, model: Ask | None = None,
        stops: bool = False,
    ) -> Judged:
        """The function's values, and the samples that failed. RewardError where no sample is to blame.

        Where a call fails, each of its samples is tried again alone, so that those that are innocent have their value.
        `stops`: no further than to the first that fails again.
        """
        who = f"reward {function.name}, {where}"
        if model is not None:
            try:
                result = _result(await self._of_model(function.name, model))
                return Judged(checked(result, arguments.size, who), {})
            except Exception as error:
                raise self._told(error, f"{who}, {arguments.size} samples together") from error
        values: list[Value] = [None] * arguments.size
        again: dict[int, str] = dict.fromkeys(range(arguments.size), "")  # sample ► what is wrong with its value
        try:
            values, again = await self._called(function, arguments, who)
        except RewardError:
            raise  # it gave something else than a value for each
        except Exception as error:
            if arguments.size == 1 and not self._retries:
                return Judged(values, {0: self._told(error, f"{who}, sample 1 of 1")})
        failed: dict[int, RewardError] = {}
        for sample, wrong in again.items():
            place = f"{who}, sample {sample + 1} of {arguments.size}"
            values[sample], error_alone = await self._alone(function, arguments.of_sample(sample), place, wrong)
            if error_alone is not None:
                failed[sample] = error_alone
            if failed and stops:
                break
        return Judged(values, failed)

    async def _alone(
        self, function: RewardFunction, arguments: Arguments, who: str, wrong: str,
    ) -> tuple[Value, RewardError | None]:
        """The value of one sample, or why it has none. `wrong`: with the value that it had among others."""
        failed = RewardError(f"{who}{wrong}", BAD_RESULT) if wrong else None
        alone = replace(arguments, logged={})  # what was logged for all stays
        for _ in range(max(1, self._retries)):
            try:
                values, wrongs = await self._called(function, alone, who)
            except RewardError as error:  # not one value for one sample: what was wrong before says more
                failed = failed or error
            except Exception as error:
                failed = self._told(error, who)
            else:
                if not wrongs:
                    return values[0], None
                failed = RewardError(f"{who}{wrongs[0]}", BAD_RESULT)
        return None, failed

    async def _called(
        self, function: RewardFunction, arguments: Arguments, who: str,
    ) -> tuple[list[Value], dict[int, str]]:
        """The values, and the samples whose value is none that counts. Raises what the call raised, or Late."""
        result = _result(await self._outcome(function, arguments, who))
        return result if function.in_child else sorted_out(result, arguments.size, who)

    def _told(self, error: BaseException, who: str) -> RewardError:
        if isinstance(error, RewardError):
            return error
        if isinstance(error, Late):
            return RewardError(f"{who}: no value within reward.deadline_s={self._deadline_s:g}", TIMED_OUT)
        return RewardError(f"{who}: {_said(error)}", RAISED)

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
        return (told["values"], dict(told["samples"])), None

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


def _result(outcome: Outcome) -> Any:
    """What the call gave. Raises Late, RewardError, or CallFailed for all else that it raised."""
    result, error = outcome
    if error is not None:
        raise error if isinstance(error, (Late, RewardError)) else CallFailed.of(error)
    return result


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
