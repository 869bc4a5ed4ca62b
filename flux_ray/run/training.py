"""A training from its first step to its last: when a step is recorded, saved and evaluated.

Takes:  a loop; where to write; the groups of actors that train.
Gives:  `Training.run`.
Knows:  when checkpoints and evaluations are due; an evaluation that reaches eval.stop_at ends the run. A run that is
        asked to end saves the weights of its last whole step first.
Never:  knows what a step does, or what is trained on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from flux_ray.accounts import Account
from flux_ray.cluster.group import Group
from flux_ray.config import Config, EvaluatedConfig, PolicyGradientConfig
from flux_ray.observability.gpus import Gpus
from flux_ray.observability.spans import Span
from flux_ray.protocols import Trains
from flux_ray.records import LoopState, Prompt, ScoredGroup
from flux_ray.run.health import Health
from flux_ray.run.numbers import Numbers
from flux_ray.run.recorder import Recorder
from flux_ray.run.saving import Saver
from flux_ray.run.stopping import SAVE_S, STEP_S, Stopped, Stopping

LOOK_EVERY_S = 0.05  # whether a step can be given up


class Loop(Protocol):
    @property
    def step(self) -> int:
        """How many steps are done."""

    @property
    def state(self) -> LoopState: ...

    async def keep(self, state: LoopState, folder: Path) -> LoopState:
        """Write what is finished and not trained on into a new folder. Gives the state that tells of it."""

    @property
    def is_settled(self) -> bool:
        """Whether the weights are those after `step` steps, and no rank is at work: a step may be given up here."""

    async def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Before the first step. What fails in its tasks ends the run."""

    def go_on(self) -> None:
        """The next step begins: all that was to be done before it is done."""

    async def train(self) -> dict[str, float]:
        """One step; its metrics."""

    def account(self) -> Account:
        """What has become of the data since the last account."""

    async def evaluate(self) -> tuple[dict[str, float], list[dict[str, object]]] | None:
        """Metrics and answers; None where there is nothing to evaluate on."""

    def timeline(self) -> list[Span]:
        """What was done in the last step, from when to when."""

    async def samples(self, count: int) -> list[tuple[Prompt, str, ScoredGroup]]:
        """At most so many of the last step's groups, each with its first response."""

    def end(self) -> None: ...


class Training:
    def __init__(self, config: Config, loop: Loop, recorder: Recorder, *, trained: Sequence[Group[Trains]],
                 progress: Callable[[], None], stopping: Stopping | None = None) -> None:
        """`progress` is called after each step."""
        self._config, self._loop, self._recorder = config, loop, recorder
        self._saver = Saver(config, lambda: recorder.folder.checkpoints, trained, keep=loop.keep,
                            warn=lambda line: recorder.warn(line))
        self._progress, self._numbers, self._stopping = progress, Numbers(recorder), stopping
        self._health, self._gpus = Health(recorder.warn), Gpus()
        self._state: LoopState | None = None  # after the last step of this process
        self._may_give_up = False  # beside a step: whatever is done may be broken off
        self._last_step = config.driver.num_steps  # less once an evaluation has reached eval.stop_at
        self._eval_every = config.eval.every if isinstance(config, EvaluatedConfig) else 0
        self._patience = config.eval.patience if isinstance(config, EvaluatedConfig) else 0
        self._stop_at, self._samples_per_step = None, 0
        if isinstance(config, PolicyGradientConfig):
            self._stop_at, self._samples_per_step = config.eval.stop_at, config.observability.samples_per_step

    async def run(self) -> None:
        """All steps. The first failure, of a step or beside one, ends the training."""
        # Else each full collection looks at the 400,000 objects that the libraries made: half of the loop's own Python
        # time with 1,000 groups in flight.
        gc.freeze()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._saver.begin(tasks)
                watching = tasks.create_task(self._gpus.watch())
                await self._loop.begin(tasks)
                await self._until_stopped()
                self._loop.end()
                watching.cancel()
        finally:
            gc.unfreeze()

    async def _until_stopped(self) -> None:
        """All steps; fewer where the run is asked to end."""
        if self._stopping is None:
            return await self._steps()
        steps, asked = asyncio.ensure_future(self._steps()), asyncio.ensure_future(self._stopping.asked.wait())
        either: set[asyncio.Future[None] | asyncio.Future[Literal[True]]] = {steps, asked}
        try:
            with self._stopping.within(STEP_S + SAVE_S):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not steps.done():
                    await self._stop(steps)
            steps.result()
        finally:
            for future in either:
                future.cancel()
            await asyncio.wait(either)

    async def _stop(self, steps: asyncio.Future[None]) -> None:
        """Waits a while for a point at which the steps can be given up, and saves what they have come to."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + STEP_S
        while not (steps.done() or self._is_settled) and clock() < end_s:  # noqa: ASYNC110 neither sets an event
            await asyncio.sleep(LOOK_EVERY_S)
        if steps.done() and (steps.exception() or self._loop.step >= self._last_step):
            return
        settled = steps.done() or self._is_settled
        steps.cancel()
        await asyncio.wait({steps})
        try:
            async with asyncio.timeout(SAVE_S):
                if settled and self._config.checkpoint.on_stop:
                    await self._save_last()
                await self._saver.finish()
        except Exception:  # the run ends in any case: the checkpoint before stands
            logging.getLogger(__name__).exception("the last checkpoint is given up")
        raise Stopped("asked to end")

    async def _save_last(self) -> None:
        """Unless nothing was done since the last checkpoint."""
        if self._state is not None and self._state.step > self._saver.step:
            self._recorder.terminal.say(f"asked to end: saving step {self._state.step}")
            await self._saver.save(self._state)

    @property
    def _is_settled(self) -> bool:
        return self._may_give_up or self._loop.is_settled

    async def _steps(self) -> None:
        await self._evaluate_first()
        self._loop.go_on()
        while self._loop.step < self._last_step and not (self._stopping and self._stopping.asked.is_set()):
            await self._one_step()

    async def _one_step(self) -> None:
        """One step, recorded. Prompts of the next start before texts are written: engines don't wait for that.

        Unless a checkpoint is due: it holds nothing that isn't written down.
        """
        step, metrics = self._loop.step, await self._loop.train()
        self._state = self._loop.state
        self._recorder.account(step, self._loop.account())
        metrics |= self._gpus.step_metrics()
        self._recorder.time_went(step, self._loop.timeline())
        self._recorder.step(step, metrics)
        self._numbers.after(self._loop.step, metrics)
        self._health.after(self._loop.step, metrics)
        self._progress()
        self._stop_if_asked()
        saves = self._saver.is_due(self._loop.step) or self._asked("save")
        if saves:
            await self._write_and_save(step)
        await self._evaluate_if_due()
        if self._asked("save") and not saves:  # by a callback of the evaluation
            saves = True
            await self._write_and_save(step)
        if self._loop.step < self._last_step:
            self._loop.go_on()
        if not saves:
            await self._write_samples(step)

    async def _write_and_save(self, step: int) -> None:
        await self._write_samples(step)
        self._recorder.folder.sync()
        await self._saver.save(self._loop.state)

    def _asked(self, wish: str) -> bool:
        """Whether a callback has asked for it, just now."""
        return self._recorder.control.take(wish) is not None

    def _stop_if_asked(self) -> None:
        why = self._recorder.control.take("stop")
        if why is not None:
            self._last_step = self._loop.step
            self._recorder.terminal.say(f"a callback has ended the run{f': {why}' if why else ''}")

    async def _write_samples(self, step: int) -> None:
        for sample in await self._loop.samples(self._samples_per_step):
            self._recorder.sample(step, *sample)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self._loop.step % every == 0

    async def _evaluate_if_due(self) -> None:
        """At the start, every eval.every steps, where a callback asks for it, and at the end.

        The end comes early where a callback asks for it, or eval.stop_at is reached.
        """
        step, asked = self._loop.step, self._asked("evaluate")
        if asked or step in (0, self._last_step) or self._is_due(self._eval_every):
            self._may_give_up = True
            evaluated = await self._loop.evaluate()
            self._may_give_up = False
            if evaluated is not None:
                self._recorder.evaluation(step, *evaluated)
                await self._saver.evaluated(self._loop.state, evaluated[0])
                self._stop_if_reached(evaluated[0])
                self._stop_if_asked()
                self._stop_if_no_better()

    async def _evaluate_first(self) -> None:
        """Evaluate before the first step, unless the resumed run has done so at this step: then its result holds."""
        step = self._loop.step
        before = self._recorder.evaluated(step) if step else None  # at 0 it would be of a run that never began
        if before is None:
            await self._evaluate_if_due()
        else:
            self._stop_if_reached(before)
            self._stop_if_no_better()

    def _stop_if_no_better(self) -> None:
        """By all evaluations so far, before a restart too."""
        metric = self._config.checkpoint.best
        if not self._patience or metric is None:
            return
        values = [line.get(metric.removeprefix("-")) for line in self._recorder.evaluations()]
        scores = [-math.inf if value is None else -value if metric.startswith("-") else value for value in values]
        count = evaluations_since_best(scores)
        if count >= self._patience:
            self._last_step = self._loop.step
            self._recorder.terminal.say(f"{count} evaluations in a row were no better by checkpoint.best={metric} "
                                        f"(eval.patience={self._patience})")

    def _stop_if_reached(self, evaluated: dict[str, float]) -> None:
        level, reached = self._stop_at, evaluated.get("eval/task_mean", -math.inf)
        if level is not None and reached >= level:
            self._last_step = self._loop.step
            self._recorder.terminal.say(f"eval/task_mean {reached:.3f} has reached eval.stop_at={level:g}")


def evaluations_since_best(scores: Sequence[float]) -> int:
    """Evaluations after the first that had the highest score.

    >>> evaluations_since_best([0.1, 0.5, 0.5, 0.4])
    2
    """
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
