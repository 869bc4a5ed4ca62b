"""The objects inside actors that train or are the reference: parts put together.

Takes:  the arguments that `build` sends; groups, by where their arrays are.
Gives:  TrainingRank (a trainer that can publish its weights), CriticRank, ReferencePolicy; engines, rollout and reward
        workers and reward models are parts as they are.
Knows:  no part knows another: here, above them, they meet. A rank holds all arrays of a part of a step before that
        part's first collective.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from flux_ray import algo
from flux_ray.batch import pair_samples
from flux_ray.cluster.group import Actor, Members, first_failure
from flux_ray.cluster.plan import CRITIC, TRAINER
from flux_ray.config import Config, PolicyGradientConfig, PPOConfig
from flux_ray.messages import Attested, GroupAt, TrainedTokens
from flux_ray.model.scoring import by_group, response_sums, scoring_samples
from flux_ray.observability.rollouts import is_kept
from flux_ray.protocols import CriticRank as CriticRankStub
from flux_ray.protocols import Engine, LogprobSums
from flux_ray.protocols import TrainingRank as TrainingRankStub
from flux_ray.records import ComparedTokens, PreferencePair, RolloutGroup, ScoredGroup, StepReport
from flux_ray.reference import Reference
from flux_ray.run.holder import Holder
from flux_ray.train import Critic, Place, Trainer
from flux_ray.weights.publish import Publisher

MIB = 2**20
PEER_DEADLINE_S = 600.0  # for the arrays that policy and critic exchange


class Held(TypedDict):
    """The groups that a rank holds, as its step takes them."""

    groups: list[RolloutGroup]
    scores: list[ScoredGroup]
    reference_logprobs: list[list[np.ndarray]] | None


class TrainingRank(Trainer):
    """A rank of the training group with its end of the weight channel to the engines."""

    def __init__(self, config: Config, *, weights_backend: str | None = None, **place: Unpack[Place]) -> None:
        """`weights_backend`: how weights go to the engines, where there are any."""
        super().__init__(config, **place)
        rank = place["rank"]
        self._rank, self._holder = rank, Holder()
        self._values: list[list[np.ndarray]] | None = None  # a critic's, of the groups that are held
        self._made: list[TrainedTokens] = []  # of the step, to be given back
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publisher: Publisher | None = None
        if isinstance(config, PolicyGradientConfig):
            assert weights_backend is not None
            self._publisher = Publisher(
                self,
                rank=rank,
                backend=weights_backend,
                deadline_s=config.weights.deadline_s,
                bucket_bytes=config.weights.bucket_mib * MIB,
                staged=staged(config),
            )

    async def meet(self, members: Members) -> None:
        self._holder.members, self._loop = members, asyncio.get_running_loop()

    async def hold(self, groups: Sequence[GroupAt]) -> list[GroupAt]:
        return await self._holder.hold(groups)

    def accumulate_held(self, *, step: int, versions: Sequence[int]) -> None:
        """`accumulate`, of the groups that are held."""
        self.accumulate(step=step, versions=versions, **self._held)
        self._keep_made()

    def train_held(self, *, step: int, versions: Sequence[int]) -> StepReport:
        """`train_step`, of the groups that are held, with the values that were taken."""
        values, self._values = self._values, None
        report = self.train_step(step=step, versions=versions, values=values, **self._held)
        self._keep_made()
        return report

    def _keep_made(self) -> None:
        config, made, self.made = self.config, self.made, None
        if made is not None and self.keeps_rollouts and isinstance(config, PolicyGradientConfig):
            reference = None if self.made_reference is None else [row for of in self.made_reference for row in of]
            values = {"advantages": made.advantages, "policy_logprobs": made.policy, "old_logprobs": made.old,
                      "entropies": made.entropies, **({} if reference is None else {"reference_logprobs": reference})}
            self._made += trained_tokens(self._holder.places, self._holder.groups, made.updates, values,
                                         share=config.observability.rollouts_share)

    async def give_back(self) -> None:
        """What the step made of its groups' tokens, to the workers that own them: they write it down."""
        made, self._made = self._made, []
        await self._holder.give_back(made)

    @property
    def _held(self) -> Held:
        from_actors = algo.needs_reference(self.config.algo) and not algo.reference_is_base(self.config)
        reference = self._holder.reference_logprobs if from_actors else None
        return {"groups": self._holder.groups, "scores": self._holder.scores, "reference_logprobs": reference}

    async def take_values(self) -> None:
        """Take the values from the critic's rank that holds the same groups."""
        critic = self._holder.members.of(CRITIC)[self._rank]
        self._values = await critic.call(CriticRankStub.give_values).within(PEER_DEADLINE_S)

    async def give_returns(self) -> list[list[np.ndarray]]:
        return self.returns

    def prepare_channel(self) -> None:
        assert self._publisher is not None
        self._publisher.prepare()

    def connect(self, engines: Sequence[Actor[Engine]], *, address: str, port: int, send_dtype: str) -> None:
        """Open the weight channel to these engines."""
        config = self.config
        assert isinstance(config, PolicyGradientConfig) and self._publisher is not None
        tensor_parallel_size = config.rollout.tensor_parallel_size

        def call(method: Callable[..., object], payloads: list[tuple[Any, ...]]) -> list[Any]:
            deadline_s = config.weights.deadline_s

            async def every() -> list[object]:
                return await first_failure([engine.call(method, *payload).within(deadline_s)
                                            for engine, payload in zip(engines, payloads, strict=True)])

            assert self._loop is not None, "it has met nobody yet"
            return asyncio.run_coroutine_threadsafe(every(), self._loop).result(2 * deadline_s)

        self._publisher.connect(call, workers_per_engine=[tensor_parallel_size] * len(engines), address=address,
                                port=port, send_dtype=send_dtype)

    def publish(self, version: int, step: int) -> list[Attested]:
        assert self._publisher is not None
        self.check_weights()
        return self._publisher.publish(version, step)

    def compare_held(self, *, engines: Sequence[int]) -> list[ComparedTokens]:
        """The engines' log-probs of the groups held, and the trainer's. Group i was sampled by the engine `engines[i]`.

        Every rank holds all groups.
        """
        groups = self._holder.groups
        return [
            ComparedTokens(engine, np.flatnonzero(trajectory.loss_mask), *(
                of_tokens[trajectory.loss_mask]
                for of_tokens in (trajectory.token_ids, trajectory.sampler_logprobs, logprobs_T)))
            for engine, group, of_group in zip(engines, groups, self.logprobs(groups), strict=True)
            for trajectory, logprobs_T in zip(group.trajectories, of_group, strict=True)
        ]


class CriticRank(Critic):
    """A rank of the critic. It holds the same groups as the policy's rank of the same number."""

    def __init__(self, config: PPOConfig, **place: Unpack[Place]) -> None:
        super().__init__(config, **place)
        self._rank, self._holder = place["rank"], Holder()
        self._values: list[list[np.ndarray]] = []  # of the groups that are held
        self._returns: list[list[np.ndarray]] = []

    async def meet(self, members: Members) -> None:
        self._holder.members = members

    async def hold(self, groups: Sequence[GroupAt]) -> list[GroupAt]:
        return await self._holder.hold(groups)

    def value_held(self) -> None:
        self._values = self.values(self._holder.groups)

    async def give_values(self) -> list[list[np.ndarray]]:
        return self._values

    async def take_returns(self) -> None:
        """Take the returns from the policy's rank that holds the same groups."""
        trainer = self._holder.members.of(TRAINER)[self._rank]
        self._returns = await trainer.call(TrainingRankStub.give_returns).within(PEER_DEADLINE_S)

    def train_held(self, *, step: int) -> StepReport:
        return self.train_step(groups=self._holder.groups, scores=self._holder.scores, values=self._values,
                               returns=self._returns, step=step)


class ReferencePolicy(Reference):
    """The frozen policy: log-probs of groups and of pairs."""

    async def group_logprobs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        """(T,) of each group's trajectories."""
        return by_group(await self.logprobs(scoring_samples(groups)), groups)

    async def pair_logprobs(self, pairs: Sequence[PreferencePair]) -> list[LogprobSums]:
        """(chosen, rejected) of each pair: the sums of the log-probs of their tokens."""
        sums = response_sums(await self.logprobs(pair_samples(pairs)))
        return list(zip(sums[::2], sums[1::2], strict=True))


def staged(config: PolicyGradientConfig) -> bool | None:
    """Whether a gloo update comes in beside running requests; None: only where that costs no memory."""
    if config.weights.staging == "auto" and config.driver.max_staleness:
        return None
    return config.weights.staging == "host"


def trained_tokens(
    places: Sequence[GroupAt], groups: Sequence[RolloutGroup], updates: Sequence[int | None],
    values: dict[str, list[np.ndarray] | None], *, share: float,
) -> list[TrainedTokens]:
    """An answer for each worker of these groups, of those in the share; `values`: (T,) of every sample, by name."""
    ends = np.cumsum([len(group.trajectories) for group in groups])
    of_worker: dict[int, list[int]] = defaultdict(list)
    for i, at in enumerate(places):
        if is_kept(at.uid, share):
            of_worker[at.worker].append(i)

    def joined(samples: list[np.ndarray] | None, chosen: Sequence[int]) -> np.ndarray | None:
        if samples is None:
            return None
        return np.concatenate([row for i in chosen for row in samples[ends[i] - len(groups[i].trajectories) : ends[i]]])

    return [
        TrainedTokens([places[i] for i in chosen], [sum(t.num_tokens for t in groups[i].trajectories) for i in chosen],
                      [updates[i] for i in chosen], {name: joined(of, chosen) for name, of in values.items()})
        for chosen in of_worker.values()
    ]
