"""One call of one reward function, with a deadline.

Takes:  a RewardFunction and its arguments, as TRL's GRPOTrainer passes them.
Gives:  one value a sample: a number, None, or a dict of these; RewardError names function, row, sample and cause.
Knows:  a call is waited for `deadline_s` seconds from its turn on; Python can't end a thread: one that hangs stays.
Keeps:  a daemon thread with an event loop for async functions, another for reward models, made at the first of them;
        one that an async function blocks for good is left, and a new one made.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flux_ray.reward.registry import RewardFunction

RAISED, TIMED_OUT, BAD_RESULT = "raised", "timed_out", "bad_result"

ANSWER_S = 5.0  # for the loop of async functions to go round once, after a call of it was late
MAX_SHOWN_CHARS = 60  # of a wrong value, in an error of one line

Outcome = tuple[Any, BaseException | None]  # what a call gave, and None; or None, and what it raised


class RewardError(RuntimeError):
    """A reward function failed. `kind` is RAISED, TIMED_OUT or BAD_RESULT; it survives pickling."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Arguments:
    """The keyword arguments of a call for `size` samples: lists of that length, and what is the same for all."""

    size: int
    per_sample: dict[str, list[Any]]
    common: dict[str, Any]

    def of_sample(self, sample: int) -> Arguments:
        alone = {name: values[sample : sample + 1] for name, values in self.per_sample.items()}
        return Arguments(1, alone, self.common)


class Caller:
    """Calls functions: async ones side by side, others one at a time (functions written for TRL expect it)."""

    def __init__(self, *, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._turn = asyncio.Lock()
        self._sides: dict[bool, _Side] = {}  # whether it is for reward models ► a loop beside this one
        self._answered: Counter[str | None] = Counter()  # calls of each reward model

    async def call(self, function: RewardFunction, arguments: Arguments, *, where: str) -> list[Any]:
        """The function's values, checked. RewardError says what went wrong; `where` names the prompt in it.

        Where it raises over the samples together, it is called once more for each alone, to tell which one it was.
        """
        who = f"reward {function.name}, {where}"
        result, error = await self._outcome(function, arguments)
        if isinstance(error, _Late):
            raise RewardError(f"{who}: no value within reward.deadline_s={self._deadline_s:g}", TIMED_OUT)
        if error is not None:
            sample = await self._guilty_sample(function, arguments)
            raise RewardError(f"{who}, {sample}: {type(error).__name__}: {error}", RAISED) from error
        return checked(result, arguments.size, who)

    async def _outcome(self, function: RewardFunction, arguments: Arguments) -> Outcome:
        """What the call gave or raised; _Late where the deadline passed. It runs from the call's own turn on."""
        call = functools.partial(function.call, **accepted(function, arguments))
        if is_async(function.call):
            return await self._beside(call, model=function.name if function.is_model else None)
        async with self._turn:
            running = asyncio.ensure_future(self._within_deadline(_in_thread(call)))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait({running})  # a thread can't be stopped: whoever is next waits for it all the same
                raise

    async def _beside(self, call: Callable[[], Any], *, model: str | None) -> Outcome:
        """The outcome of an async function, on the loop beside.

        Where a call blocks that for good, it is late by itself; those that have not begun there begin on a new one.
        """
        outcome: Outcome | None = None
        while outcome is None:
            side = self._side(for_models=model is not None)
            future, begun = side.submit(call)
            try:
                if await side.begins(begun, look_every_s=self._deadline_s):
                    outcome = await self._within_deadline(future, model=model)
            finally:
                future.cancel()  # of no effect on one that is done
            if (outcome is None or isinstance(outcome[1], _Late)) and not (side.left or await side.answers()):
                side.leave()
        return outcome

    def _side(self, *, for_models: bool) -> _Side:
        side = self._sides.get(for_models)
        if side is None or side.left:
            side = self._sides[for_models] = _Side()
        return side

    async def _within_deadline(self, future: asyncio.Future[Outcome], *, model: str | None = None) -> Outcome:
        """A reward model answers in the order in which it was asked: as long as it answers, a call waits its turn."""
        late = False
        try:
            while not (late or future.done()):
                answered = self._answered[model]
                await asyncio.wait({future}, timeout=self._deadline_s)
                late = model is None or self._answered[model] == answered
        finally:
            future.cancel()
        if future.cancelled():
            return None, _Late()
        self._answered[model] += 1
        return future.result()

    async def _guilty_sample(self, function: RewardFunction, arguments: Arguments) -> str:
        if function.is_model:
            return f"{arguments.size} samples together"
        for sample in range(arguments.size):
            _, error = await self._outcome(function, arguments.of_sample(sample))
            if isinstance(error, _Late):
                break
            if error is not None:
                return f"sample {sample + 1} of {arguments.size}"
        return f"{arguments.size} samples together"


class _Side:
    """An event loop in a thread of its own, so that an async function that blocks can't hold up the deadlines."""

    def __init__(self) -> None:
        self.left = False  # nothing new begins here
        self._loop = asyncio.new_event_loop()
        self._waiting: set[asyncio.Future[bool]] = set()  # of calls that have not begun
        self._num_begun = 0
        threading.Thread(target=self._loop.run_forever, name="async rewards", daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> tuple[asyncio.Future[Outcome], asyncio.Future[bool]]:
        """The call's outcome, and whether it begins here: False once the loop is left."""
        here = asyncio.get_running_loop()
        begun: asyncio.Future[bool] = here.create_future()
        outcome: asyncio.Future[Outcome] = here.create_future()
        self._waiting.add(begun)
        begun.add_done_callback(self._waiting.discard)

        async def run() -> None:
            if not begun.done():  # else it begins elsewhere
                _tell(here, begun, True)
                _tell(here, outcome, await _outcome_of(call))  # at once: the others' turns in this loop may be long

        running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        outcome.add_done_callback(lambda _: running.cancel())  # of no effect on one that is done
        return outcome, begun

    async def begins(self, begun: asyncio.Future[bool], *, look_every_s: float) -> bool:
        """Waits as long as others begin, or the loop answers; False where it does neither."""
        while not begun.done():
            before = self._num_begun
            await asyncio.wait({begun}, timeout=look_every_s)
            if not begun.done() and self._num_begun == before and not await self.answers():
                return False
        self._num_begun += begun.result()
        return begun.result()

    async def answers(self) -> bool:
        """Whether the loop goes round."""
        ping = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop))
        done, _ = await asyncio.wait({ping}, timeout=ANSWER_S)
        ping.cancel()
        return bool(done)

    def leave(self) -> None:
        """Whoever has not begun here is told so; what has goes on once the loop is free again."""
        self.left = True
        for begun in list(self._waiting):
            _settle(begun, False)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any) -> None:
    """Settle a future of another thread's loop."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, future, result)


class _Late(Exception):
    """The deadline passed. Not TimeoutError: a function may raise that by itself."""


async def _outcome_of(call: Callable[[], Any]) -> Outcome:
    try:
        return await call(), None
    except BaseException as error:  # a function that cancels itself or exits has failed like any other
        return None, error


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Outcome]:
    """A future of the call's outcome. The thread is a daemon: one that hangs must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def run() -> None:
        try:
            outcome: Outcome = (call(), None)
        except BaseException as error:
            outcome = (None, error)
        _tell(loop, future, outcome)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; a callable object carries `async` on its `__call__`."""
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def accepted(function: RewardFunction, arguments: Arguments) -> dict[str, Any]:
    """The arguments that the function's signature takes, its options among them."""
    given = {**arguments.common, **arguments.per_sample, **function.options}
    parameters = function.parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def checked(result: Any, size: int, who: str) -> list[Any]:
    """The values as floats, None, or dicts of these. RewardError (BAD_RESULT) names the sample with another value."""
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__iter__"):
        raise RewardError(f"{who}: gave {_shown(result)}, not a list of {size} values", BAD_RESULT)
    values = list(result)
    if len(values) != size:
        raise RewardError(f"{who}: gave {len(values)} values for {size} samples", BAD_RESULT)
    return [_checked_value(value, f"{who}, sample {place} of {size}") for place, value in enumerate(values, start=1)]


def _checked_value(value: Any, who: str) -> Any:
    if isinstance(value, dict):
        return {str(name): _checked_number(part, f"{who}, part {name!r}") for name, part in value.items()}
    return _checked_number(value, who)


def _checked_number(value: Any, who: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.inf if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise RewardError(f"{who}: gave {_shown(value)}, not a finite number or None", BAD_RESULT)
    return None if math.isnan(number) else number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '…'}"
