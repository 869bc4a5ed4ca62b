"""Writes what happens in a run, for people and for programs.

Takes:  metrics, samples, answers of an evaluation, warnings.
Gives:  lines in the run's folder and on the terminal; calls of the monitors and of the user's callbacks.
Knows:  the folder's files come first: a run whose folder can't be written to ends. A monitor's fault ends none.
Keeps:  the metrics of every step of this process (the TrainingResult's history) and of the last evaluation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from flux_ray import run_dir
from flux_ray.accounts import Account
from flux_ray.config import Config
from flux_ray.observability.callbacks import Callback, Control
from flux_ray.observability.run_folder import EVAL, EVAL_SAMPLES, SAMPLES, RunFolder, read_lines
from flux_ray.observability.spans import Span, chrome_trace, where_time_went
from flux_ray.observability.terminal import Terminal
from flux_ray.records import Prompt, ScoredGroup
from flux_ray.run import monitoring

NUM_ANSWERS = 16  # of an evaluation, in its line


class Recorder:
    def __init__(
        self, config: Config, *, folder: RunFolder, terminal: Terminal, callbacks: Sequence[Callback] = (),
        steps_done: int = 0,
    ) -> None:
        self.folder = folder
        self._callbacks, self.control = callbacks, Control()
        for callback in callbacks:
            callback.control = self.control
        self.terminal = terminal
        self.history: list[dict[str, float]] = []
        self.last_evaluation: dict[str, float] = {}
        self.steps_done = steps_done  # by earlier processes too
        self.was_ready = False  # all actors have stood once
        self._num_steps = config.driver.num_steps
        self._resume = config.resume
        self._trace_steps = frozenset(config.observability.trace_steps)
        self._monitors = monitoring.start(config, folder, first_step=steps_done, warn=self._show_warning)

    def ready(self) -> None:
        self.was_ready = True
        self.terminal.say("ready")

    def go_back(self, step: int) -> None:
        """`step` steps are done: the later ones are done again."""
        self.steps_done = step
        self.history = [line for line in self.history if line["step"] < step]
        self.folder.cut(step)

    def account(self, step: int, account: Account) -> None:
        self.folder.account(step, account)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append({"step": float(step), **metrics})
        self.steps_done = step + 1
        self.folder.metrics(step, metrics)
        self.terminal.step(step + 1, self._num_steps, metrics)
        self._monitors.step(step, metrics)
        with self.terminal.shown():
            for callback in self._callbacks:
                callback.on_step(step, dict(metrics))

    def time_went(self, step: int, timeline: Sequence[Span]) -> None:
        self.terminal.time_went(step + 1, where_time_went(timeline))
        if step in self._trace_steps:
            self.folder.trace(step, chrome_trace(timeline, step=step))

    def sample(self, step: int, prompt: Prompt, text: str, scored: ScoredGroup) -> None:
        self.folder.append(
            SAMPLES,
            {
                "step": step,
                "row": prompt.row,
                **({"set": prompt.data_set} if prompt.data_set else {}),
                "prompt": prompt.text,
                "completion": text,
                "reward": scored.rewards[0],
                "parts": {n: p[0] for n, p in scored.parts.items()},
            },
        )

    def evaluation(self, version: int, metrics: dict[str, float], answers: list[dict[str, Any]]) -> None:
        """`answers`: a line for each prompt (EvaluatedPrompt); the first samples of some stand beside them."""
        self.last_evaluation = dict(metrics)
        first = [{"prompt": answer["prompt"], "completion": answer["completions"][0], "reward": answer["rewards"][0]}
                 for answer in answers[:NUM_ANSWERS]]
        self.folder.append(EVAL, {"step": version, **metrics, "answers": first})
        self.terminal.evaluation(version, metrics)
        self._monitors.evaluation(version, metrics)
        with self.terminal.shown():
            for callback in self._callbacks:
                callback.on_evaluation(version, dict(metrics))

    def answers(self, answers: list[dict[str, Any]]) -> None:
        """All samples of an evaluation, a line a prompt."""
        self.folder.write(EVAL_SAMPLES, answers)

    def evaluations(self) -> list[dict[str, Any]]:
        """All of this run so far, by their steps; of a run that it resumes, those before it began."""
        lines = read_lines(self.folder.path / EVAL)
        begun = min((line["step"] for line in lines), default=math.inf)
        before = RunFolder(run_dir.run_of(self._resume)).path if self._resume else self.folder.path
        earlier = read_lines(before / EVAL) if before != self.folder.path else []
        return [line for line in earlier if line["step"] < begun] + lines

    def evaluated(self, version: int) -> dict[str, float] | None:
        """The evaluation's metrics at that version, by this run or the one that it resumes; None: there was none."""
        folders = [self.folder, *([RunFolder(run_dir.run_of(self._resume))] if self._resume else [])]
        return next((found for folder in folders if (found := folder.evaluated(version)) is not None), None)

    def warn(self, text: str) -> None:
        self._show_warning(text)
        self._monitors.event("warning", text)

    def _show_warning(self, text: str) -> None:
        self.terminal.say(f"warning: {text}", level=logging.WARNING)

    def warn_of(self, kind: str, text: str) -> None:
        """A warning of which many may come: the log has all of them, the terminal one of a kind each second."""
        if self.terminal.say_of(kind, f"warning: {text}", level=logging.WARNING):
            self._monitors.event("warning", text)

    def ended(self, how: str, why: str = "") -> None:
        """`how`: done, interrupted or failed. Waits for the monitors, for a bounded time."""
        self._monitors.ended(how, why)
