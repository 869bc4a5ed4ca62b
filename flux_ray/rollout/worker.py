"""A rollout worker: samples, scores and filters groups, gets reference log-probs, and keeps groups until trained.

Knows:  a text is decoded once. The driver chose the engine; the reward worker and the reference are chosen here.
Never:  runs users' code; waits for another actor without a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flux_ray.algo import filters
from flux_ray.clock import now_s
from flux_ray.cluster.group import ActorDied, ActorError, Members
from flux_ray.cluster.plan import REFERENCE, ROLLOUT
from flux_ray.config import PolicyGradientConfig
from flux_ray.messages import (
    Assignment,
    GroupAt,
    GroupDropped,
    GroupReady,
    Orders,
    PartGenerated,
    PartLost,
    TrainedTokens,
    Written,
)
from flux_ray.records import Prompt, RolloutGroup, ScoredGroup
from flux_ray.rollout import kept
from flux_ray.rollout.environments.sandboxed import SetAside
from flux_ray.rollout.generate import EngineLost
from flux_ray.rollout.kept import KeptArrays
from flux_ray.rollout.owned import Carried, Key, Owned
from flux_ray.rollout.rollout_files import RolloutFiles
from flux_ray.rollout.sampling import Sampling
from flux_ray.rollout.scoring import LostRewardWorker, Scoring, responses_of, scored_group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_UID = -(10**12)  # uids of probes begin here and go down: no prompt has such a uid
NO_ENGINE = -1  # of a group that was sampled in an earlier life of the run
MOST_PROBES = 1000  # of one engine at once


class RolloutWorker(Owned):
    """Orders start groups; `news` says what became of them."""

    def __init__(
        self, config: PolicyGradientConfig, *, index: int, tokenizer_path: str, most_groups: int,
        tokenizer: PreTrainedTokenizerBase | None = None, end_ids: Collection[int] = (), function: bytes | None = None,
    ) -> None:
        """`most_groups`: how many may wait in one reward worker at once. `tokenizer`, `end_ids`, `function`: see
        Sampling."""
        super().__init__()
        self._config, self._index = config, index
        self._sampling = Sampling(
            config, tokenizer_path=tokenizer_path, tokenizer=tokenizer, end_ids=end_ids, function=function)
        self._scoring = Scoring(config, most_groups=most_groups)
        self._files = RolloutFiles(config, worker=index)
        self._members = Members()
        self._met = asyncio.Condition()  # others are alive than before
        self._started: asyncio.Future[None] | None = None

    async def meet(self, members: Members) -> None:
        self._members = max(self._members, members, key=lambda members: members.epoch)
        self._incarnation = self._members.of(ROLLOUT)[self._index].incarnation
        async with self._met:
            self._met.notify_all()
        self._started = self._started or asyncio.ensure_future(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        """Once one of the engines lives."""
        while True:
            members = self._members
            try:
                return await self._sampling.start(members)
            except ActorDied:
                await self._others_than(members)

    async def _others_than(self, members: Members) -> None:
        """Until others are alive than these."""
        async with asyncio.timeout(2 * self._config.cluster.start_deadline_s), self._met:
            while self._members.epoch == members.epoch:
                await self._met.wait()

    async def order(self, orders: Orders) -> None:
        for key in orders.forgotten:
            self.forget(key)
        for assignment in orders.assignments:
            carried = self.carried.setdefault(assignment.key, Carried(assignment))
            self.run(carried, self._part(carried, assignment), "rollout")
        for carried in (self.carried[key] for key in orders.scored_again if key in self.carried):
            assert carried.group is not None, carried.first.key
            self.run(carried, self._finish(carried, carried.group, alone=True), "score")

    async def _part(self, carried: Carried, assignment: Assignment) -> None:
        """Generate a part. The last part to come goes on with the group."""
        seed = assignment.prompt.seed
        try:
            trajectories, step = await self._sampling.sample(assignment, self._members, self._incarnation)
        except EngineLost as lost:
            return self.tell(PartLost(*assignment.key, seed, assignment.engine, lost.incarnation, str(lost)))
        except SetAside as error:
            return self._drop(assignment.key, filters.ROLLOUT_FAILED, str(error))
        carried.parts[seed], carried.engines[seed] = (trajectories, step), assignment.engine
        self.tell(PartGenerated(*assignment.key, seed, sum(t.num_loss_tokens for t in trajectories)))
        if carried.is_generated:
            await self._finish(carried, carried.join(self._sampling.decode))

    async def _finish(self, carried: Carried, group: RolloutGroup, *, alone: bool = False) -> None:
        """Score ► filter ► reference ► ready. An evaluation's group is only scored, and not kept."""
        key, start_s = carried.first.key, now_s()
        score = self._scoring.score_alone if alone else self._scoring.score
        try:
            scores = await score(responses_of(group, carried.texts, carried.step), self._members)
        except LostRewardWorker as lost:
            return self.tell(lost.news(*key))
        except ActorError as error:
            if self._config.reward.on_failure != "drop" or error.role != "reward":
                raise
            return self._drop(key, filters.REWARD_FAILED, str(error))
        carried.scored = scored = scored_group(group, scores)
        scored_s = now_s()
        carried.score_s = scored_s - start_s
        evaluates = carried.first.evaluates
        if not evaluates:
            cause = filters.refusal(scored, self._config.filter)
            if cause is not None:
                return self._drop(key, cause)
            carried.reference = await self._referenced(group)
            carried.reference_s = now_s() - scored_s
        self.tell(_ready(carried, scored))
        if evaluates:
            del self.carried[key]

    async def _referenced(self, group: RolloutGroup) -> list[np.ndarray] | None:
        """The reference's log-probs; from who stands in the place of an actor that dies meanwhile."""
        while True:
            members = self._members
            try:
                return await self._scoring.reference(group, members)
            except ActorDied as error:
                if error.role != REFERENCE:
                    raise
            await self._others_than(members)

    def _drop(self, key: tuple[int, int], cause: str, why: str = "") -> None:
        carried = self.carried.pop(key, None)
        if carried is not None:  # else another part of it was dropped before
            self._files.dropped(carried, cause)
            self.tell(GroupDropped(*key, cause, why))

    async def keep(self, keys: Sequence[Key], file: str) -> list[Key]:
        """Write these groups, those that are finished, into a new file. Gives those that are written."""
        found = {key: one for key in keys if (one := self.carried.get(key)) is not None and one.scored is not None}
        groups = [KeptArrays(one.group, one.step, one.texts, one.scored, one.reference, one.sample_engines,
                             (one.generate_s, one.score_s, one.reference_s))
                  for one in found.values() if one.group is not None and one.scored is not None]
        if groups:
            await self.to_its_end(asyncio.to_thread(kept.write, Path(file), groups))
        return list(found)

    async def bring(self, file: str, prompts: Sequence[Prompt]) -> list[GroupReady]:
        """Own the groups of these prompts that such a file has, as if they had been made here."""
        found = await asyncio.to_thread(kept.read, Path(file), prompts)
        for one in found:
            prompt = one.group.prompt
            generate_s, score_s, reference_s = one.seconds
            self.carried[prompt.uid, 0] = Carried(
                Assignment(prompt, 0, NO_ENGINE, prompt.num_samples), group=one.group, step=one.step, texts=one.texts,
                reference=one.reference, scored=one.scored, sample_engines=one.engines, generate_s=generate_s,
                score_s=score_s, reference_s=reference_s)
        return [_ready(self.carried[one.group.prompt.uid, 0], one.scored) for one in found]

    async def take_back(self, trained: TrainedTokens) -> None:
        self._files.trained(self.carried, trained)

    async def write_rollouts(self, step: int) -> Written:
        """The step's groups, and those that were dropped since the step before. Gives why, where that can't be."""
        return await self.to_its_end(self._files.write(step))

    async def let_go(self) -> None:
        await super().let_go()
        self._files.forget()

    async def probe(self, prompts: Sequence[Prompt], engine: int) -> list[GroupAt]:
        """Have the engine sample a few tokens after each prompt, by the weights that it serves now.

        The groups are kept until the next probe.
        """
        places = []
        for i, group in enumerate(await self._sampling.probe(prompts, engine, self._members, self._incarnation)):
            uid = PROBE_UID - engine * MOST_PROBES - i
            prompt = replace(prompts[i], uid=uid)
            self.carried[uid, 0] = Carried(Assignment(prompt, 0, engine, prompt.num_samples), group=group)
            places.append(GroupAt(self._index, uid, 0))
        return places

    def close(self) -> None:
        self._sampling.close()


def _ready(carried: Carried, scored: ScoredGroup) -> GroupReady:
    assert carried.group is not None, carried.first.key
    spanning = sum(t.oldest_version != t.newest_version for t in carried.group.trajectories)
    texts = carried.texts if carried.first.evaluates else ()
    return GroupReady(*carried.first.key, scored, tuple(texts), spanning, carried.score_s, carried.reference_s)
