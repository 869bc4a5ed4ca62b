"""A run in simulated time: the real loop, ledger, stages, supervisor and rollout workers, on engines, rewards and ranks
that only let time pass.

Takes:  a config, what things cost (`Costs`), how long each response is, what each group is worth (`World`).
Gives:  `simulate`: what was started, trained on, dropped and stopped, and when each step ended.
Knows:  that a loop with nothing to run and nothing to wait for will never go on: `Deadlock`.
Never:  sleeps: the clock jumps to the next event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import math
import random
import selectors
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from flux_ray.accounts import Account, as_line
from flux_ray.cluster.group import ActorDied
from flux_ray.cluster.supervisor import OnDeath, Supervisor
from flux_ray.config import PolicyGradientConfig
from flux_ray.driver.agreement import Agreement
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.engines import Engines
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.loop import Loop
from flux_ray.driver.ranks import Ranks
from flux_ray.driver.stages import Stages
from flux_ray.driver.staleness import Bound
from flux_ray.driver.versions import Versions
from flux_ray.messages import Attested, GroupAt, Orders
from flux_ray.observability.callbacks import Control
from flux_ray.records import (
    FINISH_STOP,
    ComparedTokens,
    Completion,
    LoopState,
    Prompt,
    Responses,
    Sampled,
    SamplingRequest,
    Scores,
    StepReport,
)
from flux_ray.reward.worker import RewardWorker
from flux_ray.rollout import owned
from flux_ray.rollout.worker import RolloutWorker
from flux_ray.run.holder import Holder
from flux_ray.run.training import Training
from tests.fakes.actors import LocalGroup

DONE_TOKENS = 1e-6  # a sequence with less than this left is done: rounding
NEVER_S = 1e9  # a deadline that no simulation reaches
NOTHING_DUE_S = 86_000  # asyncio sleeps a day at most: where nothing is due before, there are only such deadlines
MOST_TOKENS = 3000


class Deadlock(AssertionError):
    """Everybody waits for somebody."""


class _NextEvent(selectors.SelectSelector):
    """Where a real loop would sleep, the clock jumps."""

    def __init__(self, clock: SimulatedTime) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > NOTHING_DUE_S:
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
    worker_s: float = 0.0  # of a group in its rollout worker, which does one thing at a time
    replace_s: float = 0.0  # until another actor stands in a dead one's place
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
    fate_of: Callable[[int], str] = lambda uid: "kept"  # or "same" (rewards alike), "failed", "deadly" (to its worker)
    prompt_tokens: int = 10
    num_rows: int = 1000
    kills: list[tuple[float, str, int]] = field(default_factory=list)  # (second, role, index)
    lost_arrays: float = 0.0  # share of the groups whose arrays a rank does not get
    seed: int = 0
    group_size: int = 1
    driver_free_s: float = 0.0
    step_of: dict[int, int] = field(default_factory=dict)  # version ► step
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(MOST_TOKENS, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(MOST_TOKENS, np.float32))
    scored: set[int] = field(default_factory=set)
    trained: dict[int, list[int]] = field(default_factory=dict)  # version ► uids of all ranks
    staleness: list[tuple[int, int]] = field(default_factory=list)  # of each group: by its oldest and newest token
    step_end_s: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    ledger_lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def batches(self) -> list[list[int]]:
        return [self.trained[version] for version in sorted(self.trained)]


class Engine:
    """Continuous batching: the sequences that run advance together, the others wait in line."""

    def __init__(self, world: World, *, max_num_seqs: int) -> None:
        self._world, self._max_num_seqs = world, max_num_seqs
        self._line: deque[tuple[int, _Request]] = deque()  # (tokens, its request)
        self._running: list[tuple[float, int, float, _Request]] = []  # ends at, number, began at (in tokens), request
        self._numbers = itertools.count()
        self._tokens = 0.0  # that each running sequence has made since the engine started
        self._held_s = 0.0  # of prefill that is still to be done
        self._at_s = 0.0
        self._paused, self.lives = False, True
        self._has_weights = asyncio.Event()
        self._version = self._step = 0
        self._step_of: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def meet(self, members: Any) -> None: ...

    async def context_length(self) -> int:
        return 10**9

    async def abandon_update(self) -> bool:
        """Every other version leaves a model that is loaded in part."""
        if self._paused and self._version % 2:
            return False
        if self._paused:
            self.resume(self._version, self._step)
        return True

    def die(self) -> None:
        self.lives = False

    async def generate(self, request: SamplingRequest) -> Sampled:
        size = self._world.group_size
        uid, first = divmod(request.seed, size)  # a part's samples keep their seeds
        await self._has_weights.wait()
        if request.probes:
            return Sampled((self._completion(1, self._version, self._version),), self._step)
        lengths = [self._world.length_of(uid, first + i) for i in range(request.n)]
        running = _Request(request.n, asyncio.get_running_loop().create_future())
        self._advance()
        self._line.extend((length, running) for length in lengths)
        self._go_on()
        try:
            await running.done
        except asyncio.CancelledError:
            self._advance()
            self._line = deque(waiting for waiting in self._line if waiting[1] is not running)
            self._running = [one for one in self._running if one[3] is not running]
            heapq.heapify(self._running)
            self._go_on()
            raise
        assert running.oldest is not None
        completions = [self._completion(length, running.oldest if i == 0 else running.newest, running.newest)
                       for i, length in enumerate(lengths)]
        return Sampled(tuple(completions), self._step_of[running.newest])

    def _completion(self, length: int, oldest: int, newest: int) -> Completion:
        versions = np.full(length, newest, np.int32)
        versions[0] = oldest
        tokens = self._world.tokens[:length]
        return Completion(tokens, self._world.logprobs[:length], versions, FINISH_STOP)

    def pause(self) -> None:
        self._advance()
        self._paused = True
        for _, _, began, request in self._running:
            if self._tokens > began:
                request.saw(self._version)

    def resume(self, version: int, step: int) -> Attested:
        self._version, self._step, self._paused = version, step, False
        self._has_weights.set()
        self._step_of[version] = step
        self._at_s = asyncio.get_running_loop().time()
        again = sum(self._world.prompt_tokens + self._tokens - began for _, _, began, _ in self._running)
        self._held_s += again * self._world.costs.prefill_s
        self._go_on()
        return Attested(str(version))

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
            length, request = self._line.popleft()
            heapq.heappush(self._running, (self._tokens + length, next(self._numbers), self._tokens, request))
            self._held_s += self._world.prompt_tokens * self._world.costs.prefill_s
        if self._timer is not None:
            self._timer.cancel()
        if self._running and not self._paused:
            wait_s = self._held_s + max(0.0, self._running[0][0] - self._tokens) * self._token_s
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._end)

    def _end(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._tokens + DONE_TOKENS:
            *_, request = heapq.heappop(self._running)
            request.saw(self._version)
            request.left -= 1
            if not request.left and not request.done.done():
                request.done.set_result(None)
        self._go_on()


@dataclass
class _Request:
    left: int  # sequences that are not done
    done: asyncio.Future[Any]
    oldest: int | None = None
    newest: int = 0

    def saw(self, version: int) -> None:
        self.oldest = version if self.oldest is None else self.oldest
        self.newest = version


class NoTexts:
    """A tokenizer that costs no time."""

    eos_token_id = pad_token_id = None

    def batch_decode(self, ids: list[Any], **_: Any) -> list[str]:
        return [""] * len(ids)


class CountedWorker(RolloutWorker):
    """The real rollout worker, which takes its time for a group; the driver's own time is spent as orders come."""

    def __init__(self, config: PolicyGradientConfig, index: int, world: World) -> None:
        self._world = world
        super().__init__(config, index=index, tokenizer_path="", most_groups=1, tokenizer=NoTexts())
        self._free_s = 0.0

    async def order(self, orders: Orders) -> None:
        self._world.driver_free_s = await _busy(self._world.driver_free_s,
                                                self._world.costs.driver_s * len(orders.assignments))
        await super().order(orders)

    async def _finish(self, carried: Any, group: Any, *, alone: bool = False) -> None:
        self._free_s = await _busy(self._free_s, self._world.costs.worker_s)
        await super()._finish(carried, group, alone=alone)

    async def texts(self, keys: Any) -> list[str | None]:
        await asyncio.sleep(self._world.costs.text_s)
        return await super().texts(keys)

    def die(self) -> None:
        for key in list(self.carried):
            self.forget(key)


async def _busy(free_s: float, seconds: float) -> float:
    """Wait for one's turn and then so long, of somebody who does one thing at a time. Gives when he is free again."""
    now_s = asyncio.get_running_loop().time()
    free_s = max(now_s, free_s) + seconds
    if free_s > now_s:
        await asyncio.sleep(free_s - now_s)
    return free_s


class Rewards:
    """A reward worker: one group at a time. It dies with the groups that the world says."""

    def __init__(self, world: World, index: int) -> None:
        self._world, self._index = world, index
        self._free_s, self._num_scored = 0.0, 0
        self._idle, self._not_alone = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._not_alone.set()
        self._one_alone = asyncio.Lock()
        self._begun: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def meet(self, members: Any) -> None:
        self._actor = members.of("reward")[self._index]

    async def begun_alone(self, uid: int) -> None:
        await RewardWorker.begun_alone(self, uid)  # type: ignore[arg-type]

    async def score_alone(self, responses: Responses) -> Scores:
        return await RewardWorker.score_alone(self, responses)  # type: ignore[arg-type]

    async def score(self, responses: Responses) -> Scores:
        return await RewardWorker.score(self, responses)  # type: ignore[arg-type]

    async def _score(self, responses: Responses) -> Scores:
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + self._world.costs.score_s
        await asyncio.sleep(self._free_s - now_s)
        uid, size = responses.prompt.uid, len(responses.texts)
        fate = self._world.fate_of(uid)
        self._world.scored.add(uid)
        if fate == "deadly":
            self._actor.kill()
            await asyncio.sleep(0)
        if fate == "failed":
            raise ArithmeticError("reward failed")
        rewards = np.zeros(size)
        rewards[0] = fate == "kept"
        return Scores(rewards, rewards, {})


class Rank:
    """A training rank; the first one has the engines that are published to. Now and then arrays don't arrive."""

    def __init__(self, world: World, index: int) -> None:
        self._world, self._holder = world, Holder()
        self.engines: list[Engine] = []  # that the weight channel is open to
        self._chance = random.Random(f"{world.seed} {index}")
        self._begun: list[int] = []  # uids of the step that are accumulated

    async def meet(self, members: Any) -> None:
        self._holder.members = members

    async def hold(self, groups: list[GroupAt]) -> list[GroupAt]:
        missing = await self._holder.hold(groups)
        lost = [at for at in groups if at.uid >= 0 and self._chance.random() < self._world.lost_arrays]
        return sorted({*missing, *lost})

    async def accumulate_held(self, *, step: int, versions: tuple[int, ...]) -> None:
        scores = self._holder.scores
        self._begun += [score.uid for score in scores]
        for held in self._holder.held:
            steps = [self._world.step_of[v] for t in held.group.trajectories for v in t.versions[t.loss_mask].tolist()]
            self._world.staleness.append((step - min(steps), step - max(steps)))
        assert all(self._world.step_of[version] == step for version in versions) and versions
        tokens = sum(score.num_tokens.sum() for score in scores)
        await asyncio.sleep(float(tokens) * self._world.costs.train_token_s)

    async def train_held(self, *, step: int, versions: tuple[int, ...]) -> StepReport:
        await self.accumulate_held(step=step, versions=versions)
        self._world.trained.setdefault(step, []).extend(self._begun)
        self._begun = []
        await asyncio.sleep(self._world.costs.train_s)
        return StepReport(step + 1)

    async def publish(self, version: int, step: int) -> list[Attested]:
        if not self.engines:
            return []
        assert self._world.step_of.setdefault(version, step) == step, "a version is of one step"
        for engine in self.engines:
            engine.pause()
        await asyncio.sleep(self._world.costs.publish_s)
        if not all(engine.lives for engine in self.engines):
            raise ActorDied("an engine died during publish", role="engine", index=0)
        return [engine.resume(version, step) for engine in self.engines]

    async def compare_held(self, *, engines: Sequence[int]) -> list[ComparedTokens]:
        return []


class Prompts:
    """Obeys as much of data.PromptSource as the loop asks for."""

    def __init__(self, config: PolicyGradientConfig, world: World) -> None:
        self._group_size, self._world = config.rollout.group_size, world
        self._ids = np.zeros(world.prompt_tokens, np.int32)

    def prompt(self, uid: int) -> Prompt:
        size = self._group_size
        return Prompt(uid, uid % self._world.num_rows, "", self._ids, {}, size, uid * size)


class Noted:
    """Obeys as much of run.recorder.Recorder as a training asks for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.terminal, self.control = SimpleNamespace(say=print), Control()

    def account(self, step: int, account: Account) -> None:
        self._world.ledger_lines.append(as_line(step, account))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._world.metrics.append(metrics)
        self._world.step_end_s.append(asyncio.get_running_loop().time())

    def sample(self, *_: Any) -> None: ...

    def evaluated(self, version: int) -> None: ...

    def warn(self, text: str) -> None: ...

    def warn_of(self, kind: str, text: str) -> None: ...

    def time_went(self, step: int, timeline: Sequence[Any]) -> None: ...


def simulate(config: PolicyGradientConfig, world: World, *, clock: SimulatedTime, start: LoopState | None = None,
             part_tokens: float = math.inf) -> Loop:
    """Run the config's steps in the world, which notes what happens. Deadlock where nothing will ever happen again."""
    world.group_size = config.rollout.group_size
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, deadline_s=NEVER_S),
                                 reward=dataclasses.replace(config.reward, deadline_s=NEVER_S))
    before = owned.BATCHING_WINDOW_S, owned.NEWS_AT_LEAST_EVERY_S
    owned.BATCHING_WINDOW_S, owned.NEWS_AT_LEAST_EVERY_S = 0.0, NEVER_S
    try:
        return clock.run(_run(config, world, start or LoopState(step=0), part_tokens))
    finally:
        owned.BATCHING_WINDOW_S, owned.NEWS_AT_LEAST_EVERY_S = before


async def _run(config: PolicyGradientConfig, world: World, start: LoopState, part_tokens: float) -> Loop:
    supervisor = Supervisor(start_deadline_s=NEVER_S, heartbeat=False)
    makers: dict[str, tuple[Callable[[int], Any], int, OnDeath]] = {
        "engine": (lambda i: Engine(world, max_num_seqs=config.rollout.max_num_seqs), config.rollout.num_engines,
                   OnDeath.REPLACE),
        "rollout": (lambda i: CountedWorker(config, i, world), config.rollout.num_workers or 1, OnDeath.REPLACE),
        "reward": (lambda i: Rewards(world, i), config.reward.num_workers, OnDeath.REPLACE),
        "trainer": (lambda i: Rank(world, i), config.train.num_ranks, OnDeath.END_RUN)}
    groups: dict[str, Any] = {}
    for role, (make, count, on_death) in makers.items():
        groups[role] = LocalGroup(role, make, count, has_deadlines=False, replace_s=world.costs.replace_s)
        supervisor.add(groups[role], on_death, informed=True)
    await supervisor.begin()
    world.ledger_lines.append(as_line(start.step - 1, Account(start.next_uid, start.unfinished)))
    bound = Bound(config.batch.prompts_per_step, config.driver.max_staleness, config.filter.oversample,
                  in_order=config.driver.deterministic)
    ledger = Ledger(bound, DropStats(config, total=0), next_uid=start.next_uid, unfinished=start.unfinished,
                    num_parts=min(config.rollout.split_groups, config.rollout.group_size),
                    num_steps=config.driver.num_steps)
    noted: Any = Noted(world)
    async def connect(actors: Sequence[Any]) -> None:
        groups["trainer"][0].object.engines = [actor.object for actor in actors]

    serving = Engines(groups["engine"], supervisor, connect)
    stages = Stages(config, ledger, workers=groups["rollout"], engines=serving, warn=noted.warn_of,
                    step=start.step)
    prompts: Any = Prompts(config, world)
    ranks = Ranks(config, trainer=groups["trainer"], critic=None, engines=serving)
    loop = Loop(config, stages=stages, ranks=ranks, prompts=prompts,
                versions=Versions(max_staleness=config.driver.max_staleness, highest=start.version),
                agreement=Agreement(config.rollout, model="model", dtype="float32",
                                    context=2 * world.prompt_tokens))
    loop.part_tokens = part_tokens
    for at_s, role, index in world.kills:
        asyncio.get_running_loop().call_later(at_s, lambda of=groups[role], i=index: of[i].kill())
    training = asyncio.ensure_future(Training(config, loop, noted, trained=[], progress=supervisor.progress).run())
    await asyncio.wait({training, supervisor.failure}, return_when=asyncio.FIRST_COMPLETED)
    supervisor.close()
    if supervisor.failure.done():
        training.cancel()
        raise supervisor.failure.result()
    training.result()
    return loop
