"""The loop: prompts in, a better policy out.

Knows:  the order of the stages, not how they are done. Synchronous training is max_staleness=0.
Never:  holds a token, a log-prob or a weight: it moves small records.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flux_ray.accounts import Account
from flux_ray.clock import now_s
from flux_ray.cluster.group import first_failure
from flux_ray.config import PolicyGradientConfig
from flux_ray.data import PromptSource
from flux_ray.driver.agreement import Agreement
from flux_ray.driver.entry import Entry, Taken
from flux_ray.driver.evaluation import Evaluated, Evaluation
from flux_ray.driver.keeping import Keeping
from flux_ray.driver.measure import batch_metrics, group_spans
from flux_ray.driver.probing import Probing
from flux_ray.driver.ranks import Ranks
from flux_ray.driver.stages import Stages
from flux_ray.driver.versions import Versions
from flux_ray.observability.described import Described
from flux_ray.observability.spans import WAIT, WRITE, Phases, Span
from flux_ray.records import LoopState, Prompt, ScoredGroup
from flux_ray.rollout.dispatch import Lengths

METRICS = (
    Described("driver/step_s", "time of the whole step, without evaluation and checkpoint", "s", "", "",
              "compare with the rows below: what it consists of"),
    Described("driver/wait_s", "the part of it in which the trainer waited for groups", "s", "", "",
              "most of the step: more engines, or `driver.max_staleness=1`"),
    Described("train/step_s", "the part of it for forward, backward and updates", "s", "", "",
              "most of the step: more `train.num_ranks`, or fewer micro-batches"),
    Described("weights/publish_s", "time from the last update until every engine has attested the new version, each of "
              "its parameters included", "s", "", "",
              "long: a larger `weights.bucket_mib`, `weights.staging`; room in `/dev/shm` on CPU"),
    Described("driver/write_s", "the part of it in which texts and rollouts of the step before are written, while the "
              "engines sample", "s", "", "", "much of the step: a lower `observability.rollouts_share`"),
    Described("driver/num_parts", "parts in which the batch came to the trainer; 1 is all at once", "part", "", "",
              "1 with `driver.streaming=always`: groups come at once, or fit one micro-batch"),
    Described("driver/version", "the version that the engines serve after the step. It counts publishes and never goes "
              "back", "version"),
)


class Loop:
    """One run of reinforcement learning, a step at a time."""

    def __init__(self, config: PolicyGradientConfig, *, stages: Stages, ranks: Ranks, prompts: PromptSource,
                 versions: Versions, agreement: Agreement) -> None:
        self._config, self._prompts, self._versions = config, prompts, versions
        self.stages, self.ranks, self.ledger = stages, ranks, stages.ledger
        self._probing = Probing(config, agreement, stages=stages, ranks=ranks, prompts=prompts)
        self._lengths = Lengths(config.rollout.max_tokens)
        self.keeping = Keeping(stages, prompts, self._lengths)
        self.evaluation: Evaluation | None = None  # None where eval.data names nothing
        #: The ranks take a part of a batch once it has so many tokens; inf: they wait for the whole batch.
        self.part_tokens = math.inf
        self._batch: list[Entry] = []  # of the last step
        self._begun_s, self._phases = now_s(), Phases(now_s)  # of the step that is under way, else of the last one
        self._weights = asyncio.Lock()  # held while the trainer's weights are of no version
        self.is_settled = True  # the weights are those of `step`, and no rank is at work on a step
        stages.on_free_slot = self._admit

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.stages.step

    async def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Publish the first weights too: a fault of the weight channel, or of either side's model, shows here.

        UserError where engines and trainer disagree, unless the config allows it.
        """
        self.stages.begin(tasks)
        await self.keeping.restore()
        await self.ranks.publish(self._versions.publish(self.step), self.step)
        self._bringing_in = tasks.create_task(self._bring_in())
        await self._probing.first()

    def go_on(self) -> None:
        """The next step begins: its prompts come in."""
        self._begun_s, self._phases = now_s(), Phases(now_s)
        self._admit()

    def _admit(self) -> None:
        """A group starts in each slot that is free."""
        while self.ledger.may_admit(self.step):
            entry, spare = self.ledger.admit(self.step)
            # A spare goes to the engines after all that the batch needs.
            self.stages.generate(entry, self._prompts.prompt(entry.uid), priority=entry.born + spare,
                                 lengths=self._lengths)

    async def train(self) -> dict[str, float]:
        """One step: take ready groups (as they come, or a whole batch) ► train ► publish, while a critic learns."""
        start_s, step, phases = now_s(), self.step, self._phases
        begun = await self._begin_step()
        self.is_settled = False
        async with self._weights:
            report = await phases.of("train", self.ranks.train(step, self._versions.holding(step)))
            train_s = now_s() - start_s - begun["driver/wait_s"]
            if self._config.driver.deterministic:
                await phases.of(WAIT, self._quiet())
            published = self.ranks.publish(self._versions.publish(report.step), report.step)
            publish = asyncio.ensure_future(phases.of("publish weights", published))
            learning = self.ranks.learn(step)
            learn = asyncio.ensure_future(phases.of("learn", learning, "critic") if self.ranks.critic else learning)
            give_back = [self.ranks.give_back()] if self.keeping.rollouts is not None else []
            await first_failure([publish, learn, *give_back])
        metrics = batch_metrics(self._batch, step, self._versions) | report.metrics | learn.result() | begun
        metrics |= {"train/step_s": train_s, "weights/publish_s": publish.result()} | self.ledger.drops.step_metrics()
        metrics |= await self._probing.after_publish()
        self._probing.watch(step, metrics)
        self.ledger.trained()
        self.stages.step = report.step
        if report.step == self._config.driver.num_steps:
            self.stages.forget(list(self.ledger.slots))  # no failure of theirs is to keep the result from being saved
        return metrics | {"driver/version": float(self._versions.highest), "driver/step_s": now_s() - self._begun_s,
                          "driver/write_s": phases.seconds(WRITE)}

    async def _quiet(self) -> None:
        """Waits for all that was started, before the engines get other weights.

        Where no engine has the weights of before any more, there is nothing to wait for.
        """
        engines = self.ranks.engines
        while engines.serving and not self.ledger.is_quiet:
            self.stages.changed.clear()
            await self.stages.changed.wait()

    async def _bring_in(self) -> None:
        """An engine that was replaced takes the version that the others serve, as soon as no update is under way."""
        engines = self.ranks.engines
        while True:
            await engines.joined.wait()
            async with self._weights:
                engines.joined.clear()
                if engines.waiting:
                    version = self._versions.highest
                    await self.ranks.publish(version, self._versions.step_of(version), only=engines.waiting)

    async def _begin_step(self) -> dict[str, float]:
        """The step's groups, all but the last part accumulated; the ranks hold the last. Gives how long it waited."""
        self._batch, num_parts, wait_s = [], 0, 0.0
        self.is_settled = True
        while True:
            start_s = now_s()
            taken = await self._phases.of(WAIT, self._next_part())
            num_parts, wait_s = num_parts + 1, wait_s + now_s() - start_s
            if not await self._phases.of("bring arrays to ranks", self._hold(taken.groups)):
                continue
            self._batch += taken.groups
            if taken.complete:
                return {"driver/wait_s": wait_s, "driver/num_parts": float(num_parts)}
            self.is_settled = False
            await self._phases.of("accumulate", self.ranks.accumulate(self.step, self._versions.holding(self.step)))
            self.is_settled = True

    async def _next_part(self) -> Taken:
        """Waits until the ledger gives groups. Surplus groups are stopped; their prompts start again."""
        while (taken := self.ledger.take(self.step, at_least=self.part_tokens)) is None:
            self.stages.changed.clear()
            await self.stages.changed.wait()
        self.stages.forget(taken.surplus)
        return taken

    async def _hold(self, part: Sequence[Entry]) -> bool:
        """Whether the ranks have all arrays of the part. Else the part goes back, and lost groups start again."""
        missing = await self.ranks.hold(part)
        if missing:
            self.ledger.back(part)
            self.stages.start_again(self.ledger.again([entry for entry in part if entry.at in missing]))
        return not missing

    async def evaluate(self) -> Evaluated | None:
        return await self.evaluation.evaluate() if self.evaluation is not None else None

    def timeline(self) -> list[Span]:
        """Of the last step."""
        return [*self._phases.spans, *group_spans(self._batch)]

    async def samples(self, count: int) -> list[tuple[Prompt, str, ScoredGroup]]:
        """Some of the last step's groups, with their first responses. Then the workers write the step's groups down,
        and forget them."""
        with self._phases.during(WRITE):
            shown = await self.keeping.texts(self._batch[:count])
            await self.keeping.write_rollouts(self.step - 1)
        self.stages.forget(self._batch)
        return shown

    async def keep(self, state: LoopState, folder: Path) -> LoopState:
        """Write the groups into a new folder that are finished and not trained on, where `state` is to be resumed."""
        kept = await self.keeping.keep(set(state.unfinished), folder)
        return replace(state, kept=kept, steps_of=self._versions.steps_of)

    @property
    def state(self) -> LoopState:
        ledger = self.ledger
        return LoopState(self.step, ledger.next_uid, ledger.unfinished, ledger.drops.total, self._versions.highest)

    def account(self) -> Account:
        """What has become of prompts since the last step's."""
        return self.ledger.account()

    def end(self) -> None:
        self._bringing_in.cancel()
        self.stages.end()
