"""What a run gave.

Gives:  TrainingResult: our names, and those by which other projects' results are read.
Never:  counts anything: it reads the metrics of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The first of them that a step has is meant.
REWARD, LOSS, TOKENS, SECONDS = ("reward/mean",), ("actor/loss", "train/loss"), (
    "rollout/tokens", "train/num_tokens"), ("driver/step_s", "train/step_s")


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave.

    Other projects' names for it are there too: `total_steps`, `final_reward`, `reward_history`, `final_loss`,
    `loss_history`, `total_tokens`, `total_time_seconds`, `checkpoint_path`. They are of the steps in `history`.

    Attributes:
        run_dir: The run's folder.
        num_steps: The steps done: as many as asked for, or fewer where `eval.stop_at` was reached.
        metrics: The metrics of the last step.
        history: The metrics of each step that this process did, the oldest first.
    """

    run_dir: Path
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    history: tuple[dict[str, float], ...] = ()

    @property
    def model_path(self) -> Path:
        """Where the trained model lies, in Hugging Face layout."""
        return self.run_dir / "model"

    def __getattr__(self, name: str) -> Any:
        if name in FURTHER:
            return FURTHER[name](self)
        samples = ". A step has batch.prompts_per_step x rollout.group_size samples" if name == "total_samples" else ""
        raise AttributeError(f"a TrainingResult has no {name!r}: its metrics are in .metrics and .history{samples}")


def _each(result: TrainingResult, names: tuple[str, ...]) -> list[float]:
    """The metric of every step. AttributeError where the run has none of that name."""
    name = next((name for name in names if result.history and name in result.history[-1]), None)
    if name is None:
        raise AttributeError(f"no step of this run has the metric {' or '.join(names)} (docs: metrics)")
    return [step[name] for step in result.history if name in step]


def _newest_checkpoint(result: TrainingResult) -> Path | None:
    from flux_ray.run.checkpoint import whole

    found = whole(result.run_dir / "checkpoints")
    return found[-1] if found else None


FURTHER: dict[str, Callable[[TrainingResult], Any]] = {
    "total_steps": lambda result: result.num_steps,
    "final_reward": lambda result: _each(result, REWARD)[-1],
    "reward_history": lambda result: _each(result, REWARD),
    "final_loss": lambda result: _each(result, LOSS)[-1],
    "loss_history": lambda result: _each(result, LOSS),
    "total_tokens": lambda result: int(sum(_each(result, TOKENS))),
    "total_time_seconds": lambda result: sum(_each(result, SECONDS)),
    "checkpoint_path": _newest_checkpoint,
}
