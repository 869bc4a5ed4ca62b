"""Training and publishing, as the loop sees them: calls to the ranks of the policy, and of a critic.

Takes:  groups that are READY, named by where their arrays are.
Gives:  hold, accumulate, train, learn, publish, probe: each waits under its own deadline.
Knows:  how groups are shared out over ranks. A critic's rank has the same share as the policy's.
Never:  sees an array; decides anything.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from flux_ray.batch import balance
from flux_ray.clock import now_s
from flux_ray.cluster.group import Group, all_within, first_failure
from flux_ray.cluster.usual import Usual
from flux_ray.config import PolicyGradientConfig
from flux_ray.driver.engines import Engines
from flux_ray.driver.entry import Entry
from flux_ray.driver.workers import Workers
from flux_ray.errors import UserError
from flux_ray.messages import GroupAt
from flux_ray.observability.described import Described
from flux_ray.protocols import CriticRank, TrainingRank
from flux_ray.records import ComparedTokens, Prompt, StepReport

PUBLISH_PHASES = 3  # start, send, finish; gloo's first two are one
DEATH_SHOWS_S = 5.0  # Ray tells of an engine's death 1 to 2 s later; what it broke fails at once
HOLD_DEADLINE_S = 600.0  # for a rank to bring the arrays of its part of a step

METRICS = (Described("critic/step_s", "time of the critic's step, beside the publishing of weights", "s", "", "",
                     "as `train/step_s`"),)


class Ranks:
    def __init__(self, config: PolicyGradientConfig, *, trainer: Group[TrainingRank], critic: Group[CriticRank] | None,
                 engines: Engines) -> None:
        self._config, self.trainer, self.critic, self.engines = config, trainer, critic, engines
        self._usual = Usual()
        self._mistaken: int | None = None  # the version that an engine attested another one for

    async def hold(self, part: Sequence[Entry]) -> list[GroupAt]:
        """Every rank, the critic's too, brings the arrays of its share before anything collective begins.

        Gives the groups that can't be had; if there are any, the part is not held.
        """
        of_ranks = balance([entry.total_tokens for entry in part], len(self.trainer))
        places = [[part[i].at for i in share] for share in of_ranks]
        holders = [self.trainer, *([self.critic] if self.critic is not None else [])]
        missing = await all_within(
            [rank.call(TrainingRank.hold, at) for group in holders for rank, at in zip(group, places, strict=True)],
            HOLD_DEADLINE_S)
        return sorted({at for of_rank in missing for at in of_rank})

    async def accumulate(self, step: int, versions: tuple[int, ...]) -> None:
        """Backward of the part that is held. The step's last part goes to `train`."""
        await self._usual.all_within("accumulate", [
            rank.call(TrainingRank.accumulate_held, step=step, versions=versions) for rank in self.trainer],
            self._config.train.deadline_s)

    async def train(self, step: int, versions: tuple[int, ...]) -> StepReport:
        """The step on the part that is held, and on the parts that were accumulated."""
        deadline_s = self._config.train.deadline_s
        if self.critic is not None:
            valued = [rank.call(CriticRank.value_held) for rank in self.critic]
            await self._usual.all_within("value", valued, deadline_s)
            await all_within([rank.call(TrainingRank.take_values) for rank in self.trainer], deadline_s)
        reports = await self._usual.all_within("train", [
            rank.call(TrainingRank.train_held, step=step, versions=versions) for rank in self.trainer], deadline_s)
        return reports[0]  # all alike: the ranks have reduced it

    async def give_back(self) -> None:
        """The ranks give back to the rollout workers what the step made of their groups' tokens."""
        await all_within([rank.call(TrainingRank.give_back) for rank in self.trainer], HOLD_DEADLINE_S)

    async def learn(self, step: int) -> dict[str, float]:
        """The critic's step on the same groups; nothing without one.

        It needs neither the policy nor the engines: they may take new weights meanwhile.
        """
        if self.critic is None:
            return {}
        start_s, deadline_s = now_s(), self._config.train.deadline_s
        await all_within([rank.call(CriticRank.take_returns) for rank in self.critic], deadline_s)
        reports = await self._usual.all_within(
            "learn", [rank.call(CriticRank.train_held, step=step) for rank in self.critic], deadline_s)
        return reports[0].metrics | {"critic/step_s": now_s() - start_s}

    async def publish(self, version: int, step: int, *, only: Collection[int] | None = None) -> float:
        """Every living engine (of `only`) serves `version`, and has attested it, when it returns.

        Gives the seconds it took. Where an engine dies meanwhile, the others take the version again. Raises what else
        fails, TimeoutError when a phase passes weights.deadline_s.
        """
        start_s = now_s()
        while True:
            try:
                engines = await self.engines.reached(only)
                if not engines or await self._published(version, step, engines):
                    self.engines.serve(engines)
                    return now_s() - start_s
            except UserError:
                raise
            except Exception as error:
                if not await self.engines.one_dies(DEATH_SHOWS_S):
                    raise
                await self.engines.abandon_update(self._config.weights.deadline_s)
                logging.getLogger(__name__).warning("version %d is published again: %s", version, error)

    async def _published(self, version: int, step: int, engines: Sequence[int]) -> bool:
        """Whether all of them attest the version and all its weights. One that doesn't takes it again, and is ended the
        second time."""
        # Rank 0 watches the deadline of each phase, and knows which engine passed it.
        deadline_s = (1 + PUBLISH_PHASES) * self._config.weights.deadline_s
        served, *_ = await self._usual.all_within(
            "publish", [rank.call(TrainingRank.publish, version, step) for rank in self.trainer], deadline_s)
        wrong = {engine: attested for engine, attested in zip(engines, served, strict=True)
                 if attested.version != str(version) or attested.wrong}
        for engine, attested in wrong.items():
            why = f"engine {engine} serves version {attested.version} after version {version} was published"
            if attested.wrong:
                why += f", with weights that were not sent: {'; '.join(attested.wrong)}"
            logging.getLogger(__name__).warning(why)
            if self._mistaken == version:
                self.engines.end(engine, why)
        if wrong and self._mistaken == version:
            await self.engines.one_dies(DEATH_SHOWS_S)
        self._mistaken = version if wrong else None
        return not wrong

    async def probe(self, prompts: Sequence[Prompt], workers: Workers) -> list[ComparedTokens] | None:
        """What each engine samples after these prompts right after a publish, with its log-probs and the trainer's.

        None where a rollout worker or an engine dies meanwhile.
        """
        # A probe goes before other requests, and yet waits for a place beside those that run.
        deadline_s = self._config.rollout.deadline_s + self._config.weights.deadline_s
        engines = self.engines.serving
        probed = await first_failure([workers.probe(prompts, engine, 2 * deadline_s) for engine in engines])
        if any(places is None for places in probed):
            return None
        places = [(engine, at) for engine, of_engine in zip(engines, probed, strict=True)
                  for at in of_engine or ()]
        groups = [at for _, at in places]
        missing = await all_within([rank.call(TrainingRank.hold, groups) for rank in self.trainer], HOLD_DEADLINE_S)
        if any(missing):
            return None
        asked = [engine for engine, _ in places]
        compared = await all_within([rank.call(TrainingRank.compare_held, engines=asked) for rank in self.trainer],
                                    deadline_s)
        return compared[0]  # every rank has compared all groups
