"""The loop: prompts in, a better policy out.

Takes:  the stream of prompts, live rooms, a place to write to.
Gives:  trained weights, a line of metrics a step, checkpoints, evaluations.
Knows:  the order of the stages and nothing of how they are done. Synchronous training is max_staleness=0.
Keeps:  the slots, the next prompt, the policy's version.
Never:  holds a token, a log-prob or a weight: it moves handles and small numbers.
"""

from __future__ import annotations

import asyncio
import math

from flux_ray.algo import filters
from flux_ray.cluster.group import ActorError, first_failure
from flux_ray.config import Config
from flux_ray.data import PromptSource
from flux_ray.driver import state as saved
from flux_ray.driver.clock import now_s
from flux_ray.driver.drops import REWARD_FAILED, Drops, refuse_unless_droppable
from flux_ray.driver.evaluation import Evaluation
from flux_ray.driver.measure import batch_metrics
from flux_ray.driver.recorder import Recorder
from flux_ray.driver.rooms import PolicyRooms, ReadyGroup, Rolled
from flux_ray.driver.slots import Slots, Taken
from flux_ray.driver.state import LoopState
from flux_ray.rollout.dispatch import Lengths


class Loop:
    """One run of reinforcement learning."""

    def __init__(
        self,
        config: Config,
        *,
        rooms: PolicyRooms,
        prompts: PromptSource,
        evaluation: Evaluation | None,
        recorder: Recorder,
        start: LoopState,
    ) -> None:
        self._config, self._rooms, self._prompts = config, rooms, prompts
        self._evaluation, self._recorder = evaluation, recorder
        self._probed = prompts.prompt(0)
        self._slots = Slots(config.batch.prompts_per_step, config.driver.max_staleness, config.filter.oversample,
                            num_steps=config.driver.num_steps)
        self._version = start.step
        self._unfinished = list(start.unfinished)  # of the run that is resumed, or surplus: they start first
        self._next_uid = start.next_uid
        self._lengths = Lengths(config.rollout.max_tokens)
        self._drops = Drops(config, total=start.prompts_dropped)
        self._last_step = config.driver.num_steps  # sooner where an evaluation reaches eval.stop_at
        self._groups: dict[int, asyncio.Task[None]] = {}  # by uid, in flight
        self._changed = asyncio.Condition()  # slots came free, or a group is ready

    async def run(self) -> None:
        """Feed prompts, carry each group through its stages and train, until the last step.

        The first failure ends all.
        """
        await self._rooms.publish(self._version)  # even the first: what is wrong with the wire shows here
        await self._evaluate_first()
        async with asyncio.TaskGroup() as tasks:
            feeding = tasks.create_task(self._feed_prompts(tasks))
            await self._train_steps()
            feeding.cancel()
            self._stop_groups()

    def _stop_groups(self) -> None:
        """What is in flight after the last step, nobody waits for."""
        for task in self._groups.values():
            task.cancel()

    async def _feed_prompts(self, tasks: asyncio.TaskGroup) -> None:
        """Consumes free slots, starts a group's task in each.

        Woken by `_train_steps` (a step's slots) or a dropped group.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._slots.has_room(version=self._version))
                uid = self._next_prompt()
                spare = self._slots.reserve(uid, version=self._version)
            self._groups[uid] = tasks.create_task(self._one_group(uid, spare=spare))

    def _next_prompt(self) -> int:
        if self._unfinished:
            return self._unfinished.pop(0)
        self._next_uid += 1
        return self._next_uid - 1

    async def _one_group(self, uid: int, *, spare: bool) -> None:
        """One prompt: roll ► score ► filter ► reference. Its group is then ready, or dropped and its slot free.

        Woken by its actors; cancelled where it is surplus. A spare goes to the engines after all that the batch needs.
        """
        prompt, born = self._prompts.prompt(uid), self._version
        rolled = await self._rooms.roll(prompt, lengths=self._lengths, born=born + spare)
        rolled_s = now_s()
        try:
            scored = await self._rooms.score(rolled)
        except ActorError as error:
            refuse_unless_droppable(error, self._config)
            self._recorder.warn_of(REWARD_FAILED, f"prompt row {rolled.row + 1} (from 1) dropped: {error}")
            return await self._drop(rolled, uid, REWARD_FAILED)
        cause = filters.refusal(scored, self._config.filter)
        if cause is not None:
            return await self._drop(rolled, uid, cause)
        scored_s = now_s()
        reference = await self._rooms.reference(rolled)
        reference_s = now_s() - scored_s
        async with self._changed:
            group = ReadyGroup(scored, rolled, reference, scored_s - rolled_s, reference_s)
            self._slots.ready(uid, group, num_tokens=int(scored.num_tokens.sum()))
            self._drops.kept(num_tokens=rolled.num_tokens, num_samples=scored.group_size)
            del self._groups[uid]
            self._changed.notify_all()

    async def _drop(self, rolled: Rolled, uid: int, cause: str) -> None:
        """Count the group and free its slot: another prompt takes it, until the batch is full."""
        async with self._changed:
            spent = self._slots.drop(uid, version=self._version)
            del self._groups[uid]
            self._changed.notify_all()
            self._drops.dropped(cause, num_tokens=rolled.num_tokens, num_samples=self._config.rollout.group_size,
                                spent=spent)

    async def _train_steps(self) -> None:
        """Consumes ready groups, as they come or a whole batch: train ► publish (a critic learns meanwhile) ► release
        their slots.

        Woken by `_one_group`.
        """
        while self._version < self._last_step:
            start_s = now_s()
            batch, last_part, begun = await self._begin_step()
            trained = await self._rooms.train(last_part, version=self._version)
            report = trained.report
            train_s = now_s() - start_s - begun["driver/wait_s"]
            publish_s, learned = await first_failure(
                [self._rooms.publish(report.version), self._rooms.train_critic(trained)]
            )
            metrics = batch_metrics(batch, version=self._version) | report.metrics | learned
            metrics |= begun | {
                "train/step_s": train_s,
                "weights/publish_s": publish_s,
            }
            metrics |= self._drops.step_metrics() | await self._rooms.probe(self._probed)
            metrics["driver/step_s"] = now_s() - start_s
            await self._after_step(report.version, batch, metrics)

    async def _begin_step(self) -> tuple[list[ReadyGroup], list[ReadyGroup], dict[str, float]]:
        """Backward of all groups of the step but the last part: all groups, that part, and what was waited."""
        batch: list[ReadyGroup] = []
        num_parts, wait_s = 0, 0.0
        while True:
            start_s = now_s()
            part = await self._next_part()
            num_parts, wait_s = num_parts + 1, wait_s + now_s() - start_s
            batch += part.groups
            if part.complete:
                return batch, part.groups, {"driver/wait_s": wait_s, "driver/num_parts": float(num_parts)}
            await self._rooms.accumulate(part.groups, version=self._version)

    async def _next_part(self) -> Taken:
        """Waits until the slots let groups go. What they make superfluous is stopped: its prompts start again."""
        async with self._changed:
            while (taken := self._slots.take(version=self._version, at_least=self._rooms.part_tokens)) is None:
                await self._changed.wait()
        self._drops.surplus(len(taken.surplus), [(group.rolled.num_tokens, group.scored.group_size)
                                                 for group in taken.unused])
        self._unfinished = [*taken.surplus, *self._unfinished]
        for uid in taken.surplus:
            if uid in self._groups:
                self._groups.pop(uid).cancel()
        return taken

    async def _after_step(self, version: int, batch: list[ReadyGroup], metrics: dict[str, float]) -> None:
        """Write what the step was, then let the next one's prompts in; engines don't wait for texts to be decoded."""
        self._recorder.step(version - 1, metrics | {"driver/version": float(version)})
        async with self._changed:  # both at once: for the slots, what is in training is of the present version
            self._version = version
            self._slots.release()
        if version == self._config.driver.num_steps:
            self._stop_groups()  # spares: no failure of theirs is to keep the result from being saved
        await self._save_if_due()
        await self._evaluate()
        if version < self._last_step:
            async with self._changed:
                self._changed.notify_all()
        else:
            self._stop_groups()
        await self._record_samples(version - 1, batch[: self._config.observability.samples_per_step])

    async def _record_samples(self, step: int, groups: list[ReadyGroup]) -> None:
        for group in groups:
            try:
                texts = await self._rooms.texts(group.rolled)
            except ActorError as error:  # its worker died of what others asked of it
                refuse_unless_droppable(error, self._config)
                continue
            self._recorder.sample(step, self._prompts.prompt(group.scored.uid), texts[0], group.scored)

    async def _save_if_due(self) -> None:
        every = self._config.checkpoint.every
        if every and self._version % every == 0:
            unfinished = tuple(sorted([*self._slots.in_flight, *self._unfinished]))
            state = LoopState(self._version, self._next_uid, unfinished, self._drops.total)
            await saved.save_whole(
                self._recorder.folder.checkpoints, state, self._rooms.training, keep=self._config.checkpoint.keep
            )

    async def _evaluate(self) -> None:
        """At the start, every eval.every steps and at the end, which comes where eval.stop_at is reached."""
        if self._evaluation is None:
            return
        last = self._version == self._config.driver.num_steps
        every = self._config.eval.every
        if self._version == 0 or last or (every and self._version % every == 0):
            metrics = await self._evaluation.run(self._rooms, version=self._version, recorder=self._recorder)
            self._stop_if_reached(metrics)

    async def _evaluate_first(self) -> None:
        """Unless the run that is resumed has done it at this version: what it gave holds."""
        before = self._recorder.evaluated(self._version) if self._version else None  # else of a run that never began
        if before is None:
            await self._evaluate()
        else:
            self._stop_if_reached(before)

    def _stop_if_reached(self, evaluated: dict[str, float]) -> None:
        level, reached = self._config.eval.stop_at, evaluated.get("eval/task_mean", -math.inf)
        if level is not None and reached >= level:
            self._last_step = self._version
            self._recorder.terminal.say(f"eval/task_mean {reached:.3f} has reached eval.stop_at={level:g}")
