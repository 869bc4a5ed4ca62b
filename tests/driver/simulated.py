"""A run in simulated time: the real loop, slots, dispatch and rooms, on actors that only let time pass.

Takes:  a Config, what things cost (`Costs`), how long each response is, what each group is worth (`World`).
Gives:  `simulate`: what was started, trained on, dropped and stopped, and when each step ended.
Knows:  that a loop with nothing to run and nothing to wait for will never go on: `Deadlock`.
Never:  sleeps: the clock jumps to the next event.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from flux_ray.cluster.group import ActorError
from flux_ray.config import Config
from flux_ray.driver.loop import Loop
from flux_ray.driver.rooms import PolicyRooms
from flux_ray.driver.state import LoopState
from flux_ray.records import Prompt, ScoredGroup, StepReport

DONE_TOKENS = 1e-6  # a sequence with less than this left is done: rounding


class Deadlock(AssertionError):
    """Everybody waits for somebody."""


class _NextEvent(selectors.SelectSelector):
    """Where a real loop would sleep, the clock jumps."""

    def __init__(self, clock: SimulatedTime) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("nothing runs, and nothing is due")
        self._clock.now_s += max(timeout, 0.0)
        return []


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when nobody has anything to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_NextEvent(self))

    def time(self) -> float:
        return self.now_s

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """As asyncio.run, from time 0."""
        self.now_s = 0.0
        try:
            return self.run_until_complete(work)
        finally:
            left = asyncio.all_tasks(self)
            for task in left:
                task.cancel()
            if left:
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))


@dataclass(frozen=True)
class Costs:
    """Seconds. An engine that runs n sequences makes a token of each in token_s + n x sequence_s."""

    token_s: float
    sequence_s: float
    prefill_s: float = 0.0  # per token of a prompt; of whatever runs, again, after an update
    score_s: float = 0.0  # of a group; a reward worker does one at a time
    text_s: float = 0.0  # of a group that is written down
    train_token_s: float = 0.0  # per token and rank
    train_s: float = 0.0  # of a step beside its tokens
    publish_s: float = 0.0
    driver_s: float = 0.0  # the driver's own time for a group: it does one thing at a time


@dataclass
class World:
    """What a run meets, and what became of it."""

    costs: Costs
    length_of: Callable[[int, int], int]  # (uid, sample) ► tokens of its response
    fate_of: Callable[[int], str] = lambda uid: "kept"  # "kept", "same" (rewards alike) or "failed"
    prompt_tokens: int = 10
    num_rows: int = 1000
    scored: set[int] = field(default_factory=set)
    trained: dict[int, list[int]] = field(default_factory=dict)  # version ► uids of all ranks
    staleness: list[tuple[int, int]] = field(default_factory=list)  # of each group: by its oldest and newest token
    step_end_s: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)

    @property
    def batches(self) -> list[list[int]]:
        return [self.trained[version] for version in sorted(self.trained)]


@dataclass
class _Group:
    """A request on an engine, then the result."""

    prompt: Prompt
    left: int  # sequences that are not done
    done: asyncio.Future[Any]
    num_tokens: int = 0
    oldest: int | None = None
    newest: int = 0

    def saw(self, version: int) -> None:
        self.oldest = version if self.oldest is None else self.oldest
        self.newest = version


class Engine:
    """Continuous batching: the sequences that run advance together, the others wait in line."""

    def __init__(self, world: World, *, max_num_seqs: int) -> None:
        self._world, self._max_num_seqs = world, max_num_seqs
        self._line: deque[tuple[int, _Group]] = deque()  # (tokens, its group)
        self._running: list[tuple[float, int, float, _Group]] = []  # ends at, number, began at (in tokens), group
        self._numbers = itertools.count()
        self._tokens = 0.0  # that each running sequence has made since the engine started
        self._held_s = 0.0  # of prefill that is still to be done
        self._at_s = 0.0
        self._paused = False
        self._version = 0
        self._timer: asyncio.TimerHandle | None = None

    async def roll(self, prompt: Prompt, temperature: float | None) -> tuple[_Group, dict[str, int]]:
        group = _Group(prompt, prompt.num_samples, asyncio.get_running_loop().create_future())
        first = prompt.seed - prompt.uid * prompt.columns["group_size"]   # a part's samples keep their seeds
        lengths = [self._world.length_of(prompt.uid, first + i) for i in range(prompt.num_samples)]
        self._advance()
        self._line.extend((length, group) for length in lengths)
        self._go_on()
        try:
            await group.done
        except asyncio.CancelledError:
            self._advance()
            self._line = deque(waiting for waiting in self._line if waiting[1] is not group)
            self._running = [running for running in self._running if running[3] is not group]
            heapq.heapify(self._running)
            self._go_on()
            raise
        group.num_tokens = sum(lengths)
        return group, {"num_tokens": group.num_tokens, "num_spanning": (group.oldest != group.newest) * len(lengths)}

    async def join(self, prompt: Prompt, parts: list[Any]) -> tuple[_Group, bool]:
        groups = [await part for part in parts]
        oldest = min(group.oldest for group in groups)
        return _Group(prompt, 0, groups[0].done, sum(g.num_tokens for g in groups), oldest,
                      max(group.newest for group in groups)), True

    def pause(self) -> None:
        self._advance()
        self._paused = True
        for _, _, began, group in self._running:
            if self._tokens > began:
                group.saw(self._version)

    def resume(self, version: int) -> str:
        self._version, self._paused = version, False
        self._at_s = asyncio.get_running_loop().time()
        again = sum(self._world.prompt_tokens + self._tokens - began for _, _, began, _ in self._running)
        self._held_s += again * self._world.costs.prefill_s
        self._go_on()
        return str(version)

    async def probe(self, prompt: Prompt) -> tuple[None, bool]:
        return None, True

    @property
    def _token_s(self) -> float:
        return self._world.costs.token_s + len(self._running) * self._world.costs.sequence_s

    def _advance(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if not self._paused and self._running:
            passed_s = now_s - self._at_s
            held_s = min(passed_s, self._held_s)
            self._held_s -= held_s
            made = (passed_s - held_s) / self._token_s  # by each
            self._tokens += made
        self._at_s = now_s

    def _go_on(self) -> None:
        """Let those in who fit, and look again when the first of them ends."""
        while self._line and len(self._running) < self._max_num_seqs:
            length, group = self._line.popleft()
            heapq.heappush(self._running, (self._tokens + length, next(self._numbers), self._tokens, group))
            self._held_s += self._world.prompt_tokens * self._world.costs.prefill_s
        if self._timer is not None:
            self._timer.cancel()
        if self._running and not self._paused:
            wait_s = self._held_s + max(0.0, self._running[0][0] - self._tokens) * self._token_s
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._end)

    def _end(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._tokens + DONE_TOKENS:
            *_, group = heapq.heappop(self._running)
            group.saw(self._version)
            group.left -= 1
            if not group.left and not group.done.done():
                group.done.set_result(None)
        self._go_on()


class Worker:
    """A reward worker: one group at a time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._free_s = 0.0

    async def score(self, rolled: Any) -> ScoredGroup:
        group = await rolled
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + self._world.costs.score_s
        await asyncio.sleep(self._free_s - now_s)
        uid, size = group.prompt.uid, group.prompt.num_samples
        self._world.scored.add(uid)
        fate = self._world.fate_of(uid)
        if fate == "failed":
            raise ActorError("reward failed", role="reward", index=0)
        rewards = np.zeros(size)
        rewards[0] = fate == "kept"
        lengths = np.full(size, group.num_tokens / size)
        return ScoredGroup(uid, rewards, rewards, {}, lengths + self._world.prompt_tokens, lengths,
                           np.zeros(size, bool), group.oldest)


    async def decode(self, rolled: Any) -> list[str]:
        await asyncio.sleep(self._world.costs.text_s)
        return [""]


class Rank:
    """A training rank; the first one has the engines that are published to."""

    def __init__(self, world: World, engines: list[Engine]) -> None:
        self._world, self._engines = world, engines
        self._begun: list[int] = []  # uids of the step that are accumulated

    async def accumulate(self, *, groups: Any, scores: list[ScoredGroup], version: int, **_: Any) -> None:
        self._begun += [score.uid for score in scores]
        for group in groups:
            rolled = await group
            self._world.staleness.append((version - rolled.oldest, version - rolled.newest))
        tokens = sum(score.num_tokens.sum() for score in scores)
        await asyncio.sleep(float(tokens) * self._world.costs.train_token_s)

    async def train_step(self, *, version: int, **groups: Any) -> StepReport:
        await self.accumulate(version=version, **groups)
        self._world.trained.setdefault(version, []).extend(self._begun)
        self._begun = []
        await asyncio.sleep(self._world.costs.train_s)
        return StepReport(version + 1)

    async def publish(self, version: int) -> list[str]:
        for engine in self._engines:
            engine.pause()
        await asyncio.sleep(self._world.costs.publish_s)
        return [engine.resume(version) for engine in self._engines]

    async def logprob_gap(self, groups: list[Any]) -> tuple[float, float]:
        return 0.0, 0.0


class Actors:
    """Obeys cluster.group.ActorGroup; the driver's own time for each group is spent when it is sent to an engine."""

    def __init__(self, role: str, actors: list[Any], world: World) -> None:
        self.role, self._actors, self._world = role, actors, world
        self._free_s = 0.0

    @property
    def size(self) -> int:
        return len(self._actors)

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        task = asyncio.ensure_future(self._run(index, method, args, kwargs))
        return task if num_returns == 1 else [_Part(task, i) for i in range(num_returns)]

    async def _run(self, index: int, method: str, args: Any, kwargs: Any) -> Any:
        if method == "roll" and self._world.costs.driver_s:
            now_s = asyncio.get_running_loop().time()
            self._free_s = max(now_s, self._free_s) + self._world.costs.driver_s
            await asyncio.sleep(self._free_s - now_s)
        return await getattr(self._actors[index], method)(*args, **kwargs)

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        return await reference

    def cancel(self, reference: Any) -> None:
        reference.cancel()

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return await self._run(index, method, args, kwargs)

    async def call_watched(self, index: int, method: str, *args: Any, **_: Any) -> Any:
        return await self._run(index, method, args, {})

    async def call_all(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> list[Any]:
        calls = [self._run(i, method, args, kwargs) for i in range(self.size)]
        return [await calls[0]] if len(calls) == 1 else list(await asyncio.gather(*calls))

    def incarnation(self, index: int) -> Any:
        return self._actors[index]


class _Part:
    """One of several results of a call: what a reference is."""

    def __init__(self, task: asyncio.Task[Any], index: int) -> None:
        self._task, self._index = task, index

    def __await__(self) -> Any:
        result = yield from self._task.__await__()
        return result[self._index]

    def cancel(self) -> None:
        self._task.cancel()


class Prompts:
    """Obeys as much of data.PromptSource as the loop asks for."""

    def __init__(self, config: Config, world: World) -> None:
        self._group_size, self._world = config.rollout.group_size, world
        self._ids = np.zeros(world.prompt_tokens, np.int32)

    def prompt(self, uid: int) -> Prompt:
        size = self._group_size
        return Prompt(uid, uid % self._world.num_rows, "", self._ids, {"group_size": size}, size, uid * size)


class Noted:
    """Obeys as much of driver.recorder.Recorder as the loop asks for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.terminal = SimpleNamespace(say=print)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._world.metrics.append(metrics)
        self._world.step_end_s.append(asyncio.get_running_loop().time())

    def sample(self, *_: Any) -> None: ...

    def evaluated(self, version: int) -> None: ...

    def warn_of(self, kind: str, text: str) -> None: ...


def simulate(config: Config, world: World, *, clock: SimulatedTime, start: LoopState | None = None,
             part_tokens: float = math.inf) -> Loop:
    """Run the config's steps in the world, which notes what happens. Deadlock where nothing will ever happen again."""
    engines = [Engine(world, max_num_seqs=config.rollout.max_num_seqs) for _ in range(config.rollout.num_engines)]
    workers = [Worker(world) for _ in range(config.reward.num_workers)]
    ranks = [Rank(world, engines if rank == 0 else []) for rank in range(config.train.num_ranks)]

    async def run() -> Loop:
        rooms = PolicyRooms(
            config, engines=Actors("engine", engines, world), rewards=Actors("reward", workers, world),  # type: ignore[arg-type]
            reference=None, trainer=Actors("trainer", ranks, world))  # type: ignore[arg-type]
        rooms.part_tokens = part_tokens
        loop = Loop(config, rooms=rooms, prompts=Prompts(config, world), evaluation=None, recorder=Noted(world),  # type: ignore[arg-type]
                    start=start or LoopState(step=0, next_uid=0))
        await loop.run()
        return loop

    return clock.run(run())
