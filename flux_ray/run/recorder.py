"""Writes what happens in a run, for people and for programs.

Takes:  metrics, samples, answers of an evaluation, warnings.
Gives:  lines in the run's folder, on the terminal and, if asked for, TensorBoard; calls of the user's callbacks.
Keeps:  the metrics of every step of this process (the TrainingResult's history) and of the last evaluation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flux_ray import run_dir
from flux_ray.accounts import Account
from flux_ray.config import Config
from flux_ray.errors import UserError
from flux_ray.observability.callbacks import Callback
from flux_ray.observability.eval_metrics import HIGH, LOW
from flux_ray.observability.run_folder import EVAL, EVAL_SAMPLES, SAMPLES, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.records import Prompt, ScoredGroup

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COUNTS = ("prompts", "failed", "num_tokens")  # of an evaluation
NUM_ANSWERS = 16  # of an evaluation, in its line


class Recorder:
    def __init__(
        self, config: Config, *, folder: RunFolder, terminal: Terminal, callbacks: Sequence[Callback] = (),
        steps_done: int = 0,
    ) -> None:
        self.folder = folder
        self._callbacks = callbacks
        self.terminal = terminal
        self.history: list[dict[str, float]] = []
        self.last_evaluation: dict[str, float] = {}
        self.steps_done = steps_done  # by earlier processes too
        self.was_ready = False  # all actors have stood once
        self._num_steps = config.driver.num_steps
        self._resume = config.resume
        self._board = _tensorboard(folder) if config.observability.tensorboard else None

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
        self._write_board(step, metrics)
        with self.terminal.shown():
            for callback in self._callbacks:
                callback.on_step(step, dict(metrics))

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
        shown = {name.removeprefix("eval/"): value for name, value in metrics.items()
                 if name.startswith("eval/") and not name.endswith((LOW, HIGH))}
        self.terminal.say(f"evaluation at step {version}: " + "  ".join(
            f"{name} {value:.0f}" if name in COUNTS else f"{name} {value:.3f}"
            for name, value in shown.items() if value or name != "failed"))
        self._write_board(version, metrics)
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
        self.terminal.say(f"warning: {text}", level=logging.WARNING)

    def warn_of(self, kind: str, text: str) -> None:
        """A warning of which many may come: the log has all of them, the terminal one of a kind each second."""
        self.terminal.say_of(kind, f"warning: {text}", level=logging.WARNING)

    def _write_board(self, step: int, metrics: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: RunFolder) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "observability.tensorboard=true needs the tensorboard package: pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder.path / "tensorboard"))
