"""The live rooms as the loop sees them: one verb for each stage, on actor groups.

Takes:  actor groups, and for each verb the small records or the handles that it needs.
Gives:  roll, score, reference, train, publish, save …: each waits under its own deadline.
Knows:  which arguments travel as handles: tokens, log-probs and masks go from actor to actor, never through the driver.
Never:  decides anything.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_ray.batch import balance
from flux_ray.cluster.group import ActorDied, ActorGroup, first_failure
from flux_ray.config import Config
from flux_ray.driver.clock import now_s
from flux_ray.driver.critic_rooms import CriticRooms
from flux_ray.driver.rolling import Rolled, Rolling
from flux_ray.records import Prompt, ScoredGroup, StepReport
from flux_ray.rollout.dispatch import Lengths
from flux_ray.rollout.routing import Router

PUBLISH_PHASES = 3  # start, send, finish; gloo's first two are one


@dataclass(frozen=True)
class ReadyGroup:
    """A group that the trainer can take."""

    scored: ScoredGroup
    rolled: Rolled
    reference: Any | None  # handle of the reference policy's log-probs
    score_s: float  # seconds that it took to be scored, waiting for a worker included
    reference_s: float


@dataclass(frozen=True)
class Trained:
    """What a training step gave, and what is left for the critic to learn from it: its calls, by rank."""

    report: StepReport
    for_critic: list[dict[str, Any]] | None


class SamplingRooms:
    """Engines and reward workers: all that an evaluation needs."""

    def __init__(self, config: Config, *, engines: ActorGroup, rewards: ActorGroup) -> None:
        self._config = config
        self._engines, self._rewards = engines, rewards
        self._rolling = Rolling(config, engines)
        self._reward_router = Router(rewards.size)
        self._second_try = asyncio.Lock()

    async def roll(
        self, prompt: Prompt, *, lengths: Lengths, born: int, temperature: float | None = None
    ) -> Rolled:
        """Generate the prompt's group; what is older goes first, then what `lengths` expects to be longer."""
        return await self._rolling.roll(prompt, lengths=lengths, born=born, temperature=temperature)

    async def score(self, rolled: Rolled, *, beside: int = 0) -> ScoredGroup:
        """`beside`: groups that may wait in the same worker, more than a step's."""
        return await self._ask_reward_worker("score", rolled, beside)

    async def texts(self, rolled: Rolled, *, beside: int = 0) -> list[str]:
        return await self._ask_reward_worker("decode", rolled, beside)

    async def _ask_reward_worker(self, method: str, rolled: Rolled, beside: int) -> Any:
        """Users' code may end or block its process. With reward.on_failure=drop the worker is then replaced.

        What the worker had is asked again, one group at a time: the group that did it fails alone (ActorDied).
        """
        try:
            return await self._ask_once(method, rolled, beside)
        except ActorDied:
            if self._config.reward.on_failure == "stop":
                raise
        async with self._second_try:
            return await self._ask_once(method, rolled, beside)

    async def _ask_once(self, method: str, rolled: Rolled, beside: int) -> Any:
        reward, batches = self._config.reward, self._config.driver.max_staleness + 1 + self._config.filter.oversample
        # All groups in flight may wait in one worker, where functions take turns; one that fails is called for each
        # sample alone. Each call has its own deadline there: this one is for a worker that answers but gets nowhere.
        groups = math.ceil(batches * self._config.batch.prompts_per_step) + beside
        calls = (1 + len(reward.functions) + self._config.rollout.group_size) * groups
        with self._reward_router.route(1) as worker:
            actor = self._rewards.incarnation(worker)
            try:
                return await self._rewards.call_watched(
                    worker,
                    method,
                    rolled.group,
                    what=f"{method} of prompt row {rolled.row + 1} (from 1)",
                    deadline_s=reward.deadline_s * calls,
                    patience_s=reward.deadline_s,
                )
            except ActorDied as error:
                if reward.on_failure == "drop":
                    deadline_s = self._config.cluster.start_deadline_s
                    await self._rewards.replace(worker, seen=actor, deadline_s=deadline_s)
                message = f"{error}; reward.functions={reward.functions}"
                raise ActorDied(message, role=error.role, index=error.index, log_file=error.log_file) from error


class PolicyRooms(SamplingRooms):
    """Engines, reward workers, reference actors (or none), training ranks and a critic's (or none)."""

    def __init__(
        self,
        config: Config,
        *,
        engines: ActorGroup,
        rewards: ActorGroup,
        reference: ActorGroup | None,
        trainer: ActorGroup,
        critic: ActorGroup | None = None,
    ) -> None:
        super().__init__(config, engines=engines, rewards=rewards)
        self._reference, self._trainer = reference, trainer
        self._reference_router = Router(reference.size) if reference else None
        self._critic = CriticRooms(config, critic) if critic else None
        self.training = TrainingRooms(config, trainer, critic)
        #: Tokens of finished groups that the ranks take before a batch is whole; inf: they wait for all of it.
        self.part_tokens = math.inf

    async def reference(self, rolled: Rolled) -> Any | None:
        """A handle of the frozen policy's log-probs; None where no KL is asked for."""
        if self._reference is None or self._reference_router is None:
            return None
        with self._reference_router.route(rolled.num_tokens) as actor:
            logprobs, done = self._reference.submit(actor, "logprobs_and_done", rolled.group, num_returns=2)
            await self._reference.result(
                done, index=actor, what="log-probs", deadline_s=self._config.reference.deadline_s
            )
            return logprobs

    async def accumulate(self, groups: list[ReadyGroup], *, version: int) -> None:
        """Backward of some of a step's groups, before `train` brings the last ones."""
        await self.training.on_each("accumulate", self._shares(groups, version))

    async def train(self, batch: list[ReadyGroup], *, version: int) -> Trained:
        """One training step on these groups, and on those that were accumulated."""
        calls = self._shares(batch, version)
        if self._critic is None:
            return Trained(await self.training.step("train_step", calls), None)
        values = await self._critic.values([call["groups"] for call in calls])
        calls = [{**call, "values": given} for call, given in zip(calls, values, strict=True)]
        report, returns = await self.training.step_and_returns(calls)
        kept = ("groups", "scores", "values", "version")
        return Trained(report, [{**{name: call[name] for name in kept}, "returns": given}
                                for call, given in zip(calls, returns, strict=True)])

    def _shares(self, batch: list[ReadyGroup], version: int) -> list[dict[str, Any]]:
        """What each rank is called with. A group stays whole: each rank gets some of them, balanced by tokens."""
        calls: list[dict[str, Any]] = []
        for share in balance([int(group.scored.num_tokens.sum()) for group in batch], self._trainer.size):
            groups = [batch[i] for i in share]
            calls.append(
                {
                    "groups": [group.rolled.group for group in groups],
                    "scores": [group.scored for group in groups],
                    "reference_logprobs": [group.reference for group in groups] if self._reference else None,
                    "version": version,
                }
            )
        return calls

    async def train_critic(self, trained: Trained) -> dict[str, float]:
        """The critic's step on the same groups, each of its ranks with the share of the policy's; nothing without one.

        It needs neither the policy nor the engines: they may take new weights meanwhile.
        """
        if self._critic is None or trained.for_critic is None:
            return {}
        return await self._critic.learn(trained.for_critic)

    async def probe(self, prompt: Prompt) -> dict[str, float]:
        """weights/logprob_gap_* of a few tokens that each engine samples right after a publish.

        For asynchronous runs, whose batches may hold no sample of the present version; nothing for synchronous ones.
        """
        if not self._config.driver.max_staleness:
            return {}
        # It goes first, and yet waits for a place beside what runs.
        deadline_s = self._config.rollout.deadline_s + self._config.weights.deadline_s
        probes = [self._engines.submit(i, "probe", prompt, num_returns=2) for i in range(self._engines.size)]
        for i, (_, done) in enumerate(probes):
            await self._engines.result(done, index=i, what="probe", deadline_s=deadline_s)
        groups = [group for group, _ in probes]
        (mean, largest), *_ = await self._trainer.call_all("logprob_gap", groups, deadline_s=deadline_s)
        return {"weights/logprob_gap_mean": mean, "weights/logprob_gap_max": largest}

    async def publish(self, version: int) -> float:
        """Every engine serves `version`, and has attested it, when it returns. Gives the seconds it took.

        Raises RuntimeError when an engine attests another version, TimeoutError when a phase passes weights.deadline_s.
        """
        start_s = now_s()
        # Rank 0 sees to the deadline of each phase, and knows which engine passed it.
        deadline_s = (1 + PUBLISH_PHASES) * self._config.weights.deadline_s
        served, *_ = await self._trainer.call_all("publish", version, deadline_s=deadline_s)
        for engine, label in enumerate(served):
            if label != str(version):
                raise RuntimeError(f"engine {engine} serves version {label} after version {version} was published")
        return now_s() - start_s


class TrainingRooms:
    """The training ranks, and the critic's beside them (or none): the part that every loop shares."""

    def __init__(self, config: Config, trainer: ActorGroup, critic: ActorGroup | None = None) -> None:
        self._config = config
        self._trainer = trainer
        self._trained = [trainer, critic] if critic else [trainer]

    async def step(self, method: str, calls: list[dict[str, Any]]) -> StepReport:
        """The same method on every rank, each with its own share; rank 0's report (reduced over ranks already)."""
        return (await self.on_each(method, calls))[0]

    async def on_each(self, method: str, calls: list[dict[str, Any]]) -> list[Any]:
        """The same method on every rank, each with its own share; what each of them gives."""
        deadline_s = self._config.train.deadline_s
        running = [self._trainer.call(rank, method, deadline_s=deadline_s, **call) for rank, call in enumerate(calls)]
        return await first_failure(running)

    async def step_and_returns(self, calls: list[dict[str, Any]]) -> tuple[StepReport, list[Any]]:
        """A policy's step with a critic's values; a handle of each rank's returns beside the report."""
        started = [self._trainer.submit(rank, "returns_and_train_step", num_returns=2, **call)
                   for rank, call in enumerate(calls)]
        reports = await first_failure([
            self._trainer.result(report, index=rank, what="train_step", deadline_s=self._config.train.deadline_s)
            for rank, (_, report) in enumerate(started)
        ])
        return reports[0], [returns for returns, _ in started]

    async def save_checkpoint(self, folder: Path) -> None:
        """One folder in it for each group that is trained, by its role."""
        await self._all("save_checkpoint", {group.role: folder / group.role for group in self._trained})

    async def save_model(self, folder: Path) -> None:
        """The policy (or what else the training ranks train) in `folder`; a critic beside it, by its role."""
        await self._all("save_model", {self._trainer.role: folder} | {
            group.role: folder.with_name(group.role) for group in self._trained if group is not self._trainer})

    async def _all(self, method: str, folders: dict[str, Path]) -> None:
        deadline_s = self._config.train.deadline_s
        await first_failure([
            group.call_all(method, str(folders[group.role]), deadline_s=deadline_s) for group in self._trained
        ])
