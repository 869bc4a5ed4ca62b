"""What a step's numbers say of the training: updates that were left out, a gradient that is nothing.

Takes:  the metrics of each step; what the ranks have kept of a step that they left out.
Gives:  `Numbers.after`: a warning, or NumbersWentWrong where several steps in a row were left out.
Knows:  a step is left out where one of its updates is, the policy's or a critic's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from flux_ray.run.recorder import Recorder
from flux_ray.run_dir import BAD_BATCHES

MOST_SKIPPED = 3  # steps in a row: one bad batch is an accident, three are none
WITHOUT_GRADIENT = 5  # steps in a row, after which it is told
SKIPPED = ("train/skipped", "critic/skipped")


class NumbersWentWrong(RuntimeError):
    """So many steps in a row had numbers that were not finite."""


class Numbers:
    """Of one life of a run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._skipped = self._without_gradient = 0  # steps in a row

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step`: how many are done. Raises NumbersWentWrong."""
        left_out = any(metrics.get(name) for name in SKIPPED)
        self._skipped = self._skipped + 1 if left_out else 0
        if left_out:
            self._tell_skipped(step)
        norm = metrics.get("train/grad_norm")  # not there while a critic learns alone, or where the step was left out
        if norm is not None:
            self._without_gradient = 0 if norm else self._without_gradient + 1
            # Where all rewards of each group are alike, that is told for itself (reward/same_frac).
            if self._without_gradient == WITHOUT_GRADIENT and metrics.get("reward/same_frac") != 1.0:
                self._recorder.warn(_nothing_to_learn(step, metrics))

    def _tell_skipped(self, step: int) -> None:
        folder = self._recorder.folder.path / BAD_BATCHES
        kept = sorted(folder.glob(f"step-{step:06d}-*.json"))
        why = "; ".join(map(_why, kept)) or "a loss or a gradient"
        told = f"step {step}: not finite: {why}"
        if self._skipped == MOST_SKIPPED:
            raise NumbersWentWrong(f"{told}; {MOST_SKIPPED} steps in a row were left out (their batches: {folder})")
        where = f"; its batch: {folder}/step-{step:06d}-*.safetensors" if kept else ""
        if (folder / f"step-{step:06d}-trainer.json") in kept:
            run = shlex.quote(str(self._recorder.folder.path))
            where += f"; `flux-ray replay {run} --step {step - 1} --left-out` computes it again"
        self._recorder.warn(f"{told}. The update is left out, the weights stay{where} ({self._skipped} in a row, at "
                            f"{MOST_SKIPPED} the run goes back)")


def _why(kept: Path) -> str:
    """What a rank has written of the first update that it left out."""
    first = json.loads(kept.read_text(encoding="utf-8"))["skipped"][0]
    return f"{first['why']} (update {first['update']})"


def _nothing_to_learn(step: int, metrics: Mapping[str, float]) -> str:
    if not metrics.get("train/num_tokens", 1.0):
        cause = "no token is learned from (train/num_tokens is 0)"
    else:
        cause = ("mostly all samples of each group have the same reward, the loss is masked everywhere, or nothing "
                 "that the loss depends on is trained")
    return f"step {step}: the gradient was exactly 0 for {WITHOUT_GRADIENT} steps in a row: {cause}"
