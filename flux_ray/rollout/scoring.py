"""Gets a group's scores from reward workers, and its log-probs from reference actors.

Takes:  a group with its texts; who is alive.
Gives:  Scores, log-probs; `responses_of`: what rewards see of a group; `scored_group`: what the driver sees.
Knows:  users' code may end its reward worker or block it: a worker that answers nobody counts as dead.
Never:  ends an actor: it says which one to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from flux_ray.cluster.group import Actor, ActorDied, Call, Members, Router
from flux_ray.cluster.plan import REFERENCE, REWARD
from flux_ray.config import PolicyGradientConfig
from flux_ray.messages import RewardWorkerLost
from flux_ray.protocols import ReferenceScorer, RewardScorer
from flux_ray.records import FINISH_LENGTH, Prompt, Responses, RolloutGroup, ScoredGroup, Scores


class LostRewardWorker(Exception):
    """The reward worker is gone, or answers nobody, and the run goes on. `guilty`: the group was alone there."""

    def __init__(self, actor: Actor[RewardScorer], *, silent: bool, guilty: bool, why: str) -> None:
        super().__init__(why)
        self.actor, self.silent, self.guilty, self.why = actor, silent, guilty, why

    def news(self, uid: int, attempt: int) -> RewardWorkerLost:
        return RewardWorkerLost(uid, attempt, self.actor.index, self.actor.incarnation, self.silent, self.guilty,
                                self.why)


class Scoring:
    def __init__(self, config: PolicyGradientConfig, *, most_groups: int) -> None:
        """`most_groups`: how many may wait in one reward worker at once."""
        self._config = config
        # Functions take turns, and one that fails is called for each sample alone. Each call has its own deadline
        # there; this one is for a worker that answers but gets nowhere.
        alone = config.rollout.group_size * max(1, config.reward.retries)
        calls = (1 + len(config.reward.functions)) * (1 + alone) * most_groups
        self._deadline_s = config.reward.deadline_s * calls
        self._rewards: Router[RewardScorer] = Router()
        self._references: Router[ReferenceScorer] = Router()
        self._dead: set[str] = set()  # incarnations: they stay among the members until another takes their place

    async def score(self, responses: Responses, members: Members) -> Scores:
        """Raises ActorError where a reward failed; with reward.on_failure=drop LostRewardWorker for a lost one."""
        actor = self._choose(members)
        try:
            return await self._watched(actor, actor.together().call(RewardScorer.score, responses), responses.prompt)
        finally:
            self._rewards.done(actor, 1)

    async def score_alone(self, responses: Responses, members: Members) -> Scores:
        """As `score`, while nothing else is scored in the reward worker: if it is lost then, the group is guilty."""
        actor, prompt = self._choose(members), responses.prompt
        call = actor.call(RewardScorer.score_alone, responses)
        begun = asyncio.ensure_future(actor.call(RewardScorer.begun_alone, prompt.uid).within(self._deadline_s))
        try:
            return await self._watched(actor, call, prompt)
        except LostRewardWorker as lost:
            guilty = begun.done() and not begun.cancelled() and begun.exception() is None
            raise LostRewardWorker(actor, silent=lost.silent, guilty=guilty, why=lost.why) from None
        finally:
            begun.cancel()
            self._rewards.done(actor, 1)

    def _choose(self, members: Members) -> Actor[RewardScorer]:
        """Leaves out dead workers: their calls fail at once, so that they always have the fewest outstanding."""
        actors = members.of(REWARD)
        return self._rewards.choose([actor for actor in actors if actor.incarnation not in self._dead] or actors, 1)

    async def _watched(self, actor: Actor[RewardScorer], call: Call[Scores], prompt: Prompt) -> Scores:
        what, reward = f"score of {prompt.where}", self._config.reward
        silent = False
        try:
            waiting = asyncio.ensure_future(call.within(self._deadline_s, what=what))
            silent = not await _answers(actor, waiting, patience_s=reward.deadline_s)
            if not silent:
                return await waiting
            why = f"reward {actor.index}, {what}: the process did not answer for {reward.deadline_s:g} s and was ended"
        except ActorDied as error:
            if error.role != REWARD:
                raise
            self._dead.add(actor.incarnation)
            why = str(error)
        why = f"{why}; reward.functions={reward.functions}"
        if reward.on_failure == "drop":
            raise LostRewardWorker(actor, silent=silent, guilty=False, why=why)
        raise ActorDied(why, role=actor.role, index=actor.index)

    async def reference(self, group: RolloutGroup, members: Members) -> list[np.ndarray] | None:
        """The frozen policy's log-probs, (T,) of each trajectory; None where no actor is asked for them."""
        actors = members.of(REFERENCE)
        if not actors:
            return None
        num_tokens = sum(t.num_tokens for t in group.trajectories)
        actor = self._references.choose(actors, num_tokens)
        try:
            call = actor.together().call(ReferenceScorer.group_logprobs, [group])
            return (await call.within(self._config.reference.deadline_s, what="log-probs"))[0]
        finally:
            self._references.done(actor, num_tokens)


async def _answers(actor: Actor[RewardScorer], waiting: asyncio.Future[Scores], *, patience_s: float) -> bool:
    """Until the result is there; False, and no longer waited for, where the process doesn't even answer a ping."""
    try:
        while not (await asyncio.wait({waiting}, timeout=patience_s))[0]:
            if not await actor.ping(patience_s) and not waiting.done():
                return False
        return True
    finally:
        if not waiting.done():
            waiting.cancel()


def responses_of(group: RolloutGroup, texts: Sequence[str], step: int) -> Responses:
    """`step`: updates that the newest policy among the group's tokens had."""
    trajectories = group.trajectories
    return Responses(
        group.prompt, tuple(texts), tuple(t.token_ids for t in trajectories),
        tuple(t.prompt_length for t in trajectories), tuple(t.finish_reason for t in trajectories),
        np.array([t.num_loss_tokens for t in trajectories]), step)


def scored_group(group: RolloutGroup, scores: Scores) -> ScoredGroup:
    trajectories = group.trajectories
    return ScoredGroup(
        uid=group.prompt.uid, rewards=scores.rewards, task_rewards=scores.task_rewards, parts=scores.parts,
        num_tokens=np.array([t.num_tokens for t in trajectories]),
        num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
        truncated=np.array([t.finish_reason == FINISH_LENGTH for t in trajectories]),
        oldest_version=min((t.oldest_version for t in trajectories if t.num_loss_tokens), default=-1))
