"""The smallest actors that a loop can run on, all of them made in this process.

Gives:  `Parts`: engines, reward worker, reference and trainer in one object, which notes what it is given; `train`: the
        real loop on the real rollout workers, stages, ranks and supervisor, over such parts.
Knows:  what a method raises reaches its caller as from a real actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flux_ray.cluster.group import Members
from flux_ray.cluster.supervisor import OnDeath, Supervisor
from flux_ray.config import PolicyGradientConfig
from flux_ray.data import PromptSource
from flux_ray.driver.agreement import Agreement
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.engines import Engines
from flux_ray.driver.evaluation import Evaluation
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.loop import Loop
from flux_ray.driver.ranks import Ranks
from flux_ray.driver.stages import Stages
from flux_ray.driver.staleness import Bound
from flux_ray.driver.versions import Versions
from flux_ray.messages import Attested, GroupAt, Orders
from flux_ray.records import (
    FINISH_STOP,
    ComparedTokens,
    Completion,
    LoopState,
    Prompt,
    Responses,
    RolloutGroup,
    Sampled,
    SamplingRequest,
    Scores,
    StepReport,
)
from flux_ray.rollout.worker import RolloutWorker
from flux_ray.run.holder import Holder
from flux_ray.run.recorder import Recorder
from flux_ray.run.training import Training
from tests.fakes.actors import LocalGroup

NUM_WORDS = 97


@dataclass
class Parts:
    """What each of them saw. A prompt of an evaluation is noted by its place there, as if it were a uid."""

    rewards_of: Any  # uid ► rewards of its samples, or an ArithmeticError to raise
    seconds_of: Any = None  # Prompt ► how long its request takes; at once where it isn't given
    deadly: set[int] = field(default_factory=set)  # uids whose worker dies as an engine gets their first request
    lost: set[int] = field(default_factory=set)  # uids whose worker dies as the trainer first asks for their arrays
    version: int = -1  # that the engines serve
    step: int = 0  # of that
    published: list[tuple[int, int]] = field(default_factory=list)  # version, step
    rolled: list[int] = field(default_factory=list)
    abandoned: list[int] = field(default_factory=list)  # whose request was cancelled while the run went on
    ended: bool = False
    sampled: dict[int, list[int]] = field(default_factory=dict)  # uid ► the sampled token of each sample
    referenced: list[int] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    probed: list[list[int]] = field(default_factory=list)  # the engine of each probed group
    gap_of: Any = None  # (engine, version, position) ► what the trainer's log-prob is above the engine's; none: 0
    holder: Holder = field(default_factory=Holder)  # the trainer's
    assigned: dict[int, tuple[Prompt, int]] = field(default_factory=dict)  # by seed: a part, and who carries it

    async def meet(self, members: Members) -> None:
        self.holder.members = members

    async def context_length(self) -> int:
        return 10**6

    async def generate(self, request: SamplingRequest) -> Sampled:
        if not request.probes:  # a probe's
            prompt, worker = self.assigned[request.seed]
            self.rolled.append(prompt.uid)
            if prompt.uid in self.deadly:
                self.deadly.remove(prompt.uid)
                self.holder.members.of("rollout")[worker].kill()
            try:
                await asyncio.sleep(self.seconds_of(prompt) if self.seconds_of else 0)
            except asyncio.CancelledError:
                self.abandoned += [] if self.ended else [prompt.uid]
                raise
        one, version = np.zeros(1, np.float32), np.full(1, self.version, np.int32)
        tokens = [np.full(1, (request.seed + i) % NUM_WORDS, np.int32) for i in range(request.n)]
        return Sampled(tuple(Completion(token, one, version, FINISH_STOP) for token in tokens), self.step)

    async def score(self, responses: Responses) -> Scores:
        rewards = self.rewards_of(_noted(responses.prompt.uid))
        if isinstance(rewards, ArithmeticError):
            raise rewards
        values = np.array(rewards, float)
        return Scores(values, values, {"made": values})

    async def group_logprobs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        self.referenced += [group.prompt.uid for group in groups]
        return [[np.zeros(t.num_tokens, np.float32) for t in group.trajectories] for group in groups]

    async def hold(self, groups: Sequence[GroupAt]) -> list[GroupAt]:
        for at in groups:
            if at.uid in self.lost:
                self.lost.remove(at.uid)
                self.holder.members.of("rollout")[at.worker].kill()
        return await self.holder.hold(groups)

    def train_held(self, *, step: int, versions: Sequence[int]) -> StepReport:
        assert (self.version, self.step) == (versions[-1], step), "it was published before it is trained on"
        uids = [score.uid for score in self.holder.scores]
        self.trained.append(uids)
        for uid, held in zip(uids, self.holder.held, strict=True):
            assert held.group.prompt.uid == uid and held.reference_logprobs is not None
            self.sampled[uid] = [int(t.token_ids[-1]) for t in held.group.trajectories]
        return StepReport(step + 1, {"actor/loss": 0.5})

    def publish(self, version: int, step: int) -> list[Attested]:
        self.version, self.step = version, step
        self.published.append((version, step))
        return [Attested(str(version))] * len(self.holder.members.of("engine"))

    def compare_held(self, *, engines: Sequence[int]) -> list[ComparedTokens]:
        """The gap that the test asks for, of one token a group, at the end of its prompt."""
        versions = {t.newest_version for group in self.holder.groups for t in group.trajectories}
        assert versions == {self.version}, "what was probed is the present version"
        self.probed.append(list(engines))
        compared = []
        for engine, group in zip(engines, self.holder.groups, strict=True):
            position = len(group.prompt.token_ids)
            gap = self.gap_of(engine, self.version, position) if self.gap_of else 0.0
            compared.append(ComparedTokens(engine, np.array([position]), np.array([7]), np.float32([-1.0]),
                                           np.float32([-1.0 + gap])))
        return compared

    def save_checkpoint(self, folder: str, background: str) -> None:
        self.saved.append(folder)

    async def finish_checkpoint(self) -> str | None:
        return None


def _noted(uid: int) -> int:
    return uid if uid >= 0 else -1 - uid


class Tokenizer:
    """All says the same."""

    eos_token_id = pad_token_id = None

    def batch_decode(self, ids: list[Any], **_: Any) -> list[str]:
        return ["text"] * len(ids)


class Worker(RolloutWorker):
    """The real one; it notes whose requests the engines will get."""

    def __init__(self, config: PolicyGradientConfig, index: int, parts: Parts) -> None:
        super().__init__(config, index=index, tokenizer_path="", most_groups=1, tokenizer=Tokenizer())
        self._number, self._parts = index, parts

    async def order(self, orders: Orders) -> None:
        for assignment in orders.assignments:
            prompt = replace(assignment.prompt, uid=_noted(assignment.prompt.uid))
            self._parts.assigned[prompt.seed] = prompt, self._number
        await super().order(orders)

    def die(self) -> None:
        for key in list(self.carried):
            self.forget(key)


async def train(config: PolicyGradientConfig, parts: Parts, *, prompts: PromptSource, recorder: Recorder,
                start: LoopState, kept: Path | None = None) -> None:
    """All steps, with evaluations on the same prompts where eval.every asks for them. Raises what ends the run.

    `kept`: the folder with the groups that `start` has kept.
    """
    supervisor = Supervisor(start_deadline_s=5)
    groups: dict[str, Any] = {
        "engine": LocalGroup("engine", lambda index: parts, config.rollout.num_engines),
        "rollout": LocalGroup("rollout", lambda index: Worker(config, index, parts), config.rollout.num_workers or 1),
        "reward": LocalGroup("reward", lambda index: parts, 1),
        "reference": LocalGroup("reference", lambda index: parts, 1),
        "trainer": LocalGroup("trainer", lambda index: parts, 1),
    }
    for role, group in groups.items():
        replaced = role == "rollout"
        supervisor.add(group, OnDeath.REPLACE if replaced else OnDeath.END_RUN, informed=role != "reference")
    await supervisor.begin()
    loop = make_loop(config, groups, supervisor, prompts=prompts, recorder=recorder, start=start)
    loop.keeping.kept = (start.kept, kept) if kept is not None else None
    training = asyncio.ensure_future(Training(config, loop, recorder, trained=[groups["trainer"]],
                                              progress=supervisor.progress).run())
    await asyncio.wait({training, supervisor.failure}, return_when=asyncio.FIRST_COMPLETED)
    parts.ended = True
    supervisor.close()
    if supervisor.failure.done():
        training.cancel()
        raise supervisor.failure.result()
    training.result()


def make_loop(config: PolicyGradientConfig, groups: dict[str, Any], supervisor: Supervisor, *, prompts: PromptSource,
              recorder: Recorder, start: LoopState) -> Loop:
    bound = Bound(config.batch.prompts_per_step, config.driver.max_staleness, config.filter.oversample,
                  in_order=config.driver.deterministic)
    ledger = Ledger(bound, DropStats(config, total=start.prompts_dropped), num_steps=config.driver.num_steps,
                    num_parts=min(config.rollout.split_groups, config.rollout.group_size), next_uid=start.next_uid,
                    unfinished=start.unfinished)
    engines = Engines(groups["engine"], supervisor, None)
    stages = Stages(config, ledger, workers=groups["rollout"], engines=engines, warn=recorder.warn_of,
                    step=start.step)
    ranks = Ranks(config, trainer=groups["trainer"], critic=None, engines=engines)
    loop = Loop(config, stages=stages, ranks=ranks, prompts=prompts,
                versions=Versions(max_staleness=config.driver.max_staleness, highest=start.version,
                                  steps_of=start.steps_of),
                agreement=Agreement(config.rollout, model="model", dtype="float32", context=200))
    if config.eval.every:
        loop.evaluation = Evaluation(config, prompts, stages)
    return loop
