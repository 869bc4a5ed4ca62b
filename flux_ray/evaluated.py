"""`flux-ray eval`: what a model is worth on some data, alone or against another one.

Takes:  the words of the command line; a Config.
Gives:  `words`: options from them; `evaluate`: an Evaluation; `told` and `as_json`: what is printed of one, or of two.
Knows:  two models are compared on the prompts that both answered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flux_ray import run_dir
from flux_ray.api import FluxTrainer
from flux_ray.config import Config, changed
from flux_ray.errors import UserError
from flux_ray.observability.eval_metrics import interval, paired_interval
from flux_ray.observability.run_folder import EVAL, read_lines
from flux_ray.run_dir import CONFIG

USAGE = "flux-ray eval model=PATH data=FILE [OPTION=VALUE ...] [--against MODEL] [--json FILE]"
AGAINST = "against"  # the other model's folder in the evaluation's own


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"flux-ray eval: {message} ({USAGE})")


@dataclass(frozen=True)
class Asked:
    overrides: list[str]
    against: str | None
    json_file: Path | None


@dataclass(frozen=True)
class Evaluation:
    """Of one model. `answers`: a line a prompt, as eval.jsonl has them; none without rollouts."""

    model: str
    folder: Path
    metrics: dict[str, float]
    answers: list[dict[str, Any]]

    def worth(self) -> dict[tuple[str, int], float]:
        """Set and row of each prompt ► the mean task reward of its samples; those without any are left out."""
        rewards = {(str(one.get("set", "")), int(one["row"])): [r for r in one["task_rewards"] if r is not None]
                   for one in self.answers}
        return {key: float(np.mean(values)) for key, values in rewards.items() if values}


def words(arguments: Sequence[str]) -> Asked:
    """`model=` and `data=` are short for model.path and eval.data. A run's folder stands for its model and options."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--against")
    parser.add_argument("--json", type=Path, dest="json_file")
    asked, others = parser.parse_known_args(list(arguments))
    overrides: list[str] = []
    for word in others:
        key, equals, value = word.partition("=")
        if equals and key in ("model", "model.path"):
            overrides += _of_model(value)
        elif equals and key == "data":
            overrides.append(f"eval.data={value}")
        else:
            overrides.append(word)
    return Asked(overrides, asked.against, asked.json_file)


def _of_model(path: str) -> list[str]:
    if not (Path(path).expanduser() / CONFIG).is_file():
        return [f"model.path={path}"]
    return [f"resume={path}", f"model.path={model_of(path)}"]


def model_of(path: str) -> str:
    """A model's path: itself, or the model of a run's folder. UserError where that run has none yet."""
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        return path
    if not (folder / "model").is_dir():
        raise UserError(f"{path}: this run has no model yet: flux-ray checkpoint export makes one of a checkpoint")
    return str(folder / "model")


def evaluate(config: Config, *, against: str | None = None) -> list[Evaluation]:
    """The model of the config; then the one that it is compared with, on the same data."""
    folder = config.run_dir or str(run_dir.new())
    found = [_evaluated(changed(config, {"run_dir": folder}))]
    if against is not None:
        other = {"model.path": model_of(against), "run_dir": str(Path(folder, AGAINST))}
        found.append(_evaluated(changed(config, other)))
    return found


def _evaluated(config: Config) -> Evaluation:
    metrics = FluxTrainer(config).evaluate()
    folder = Path(str(config.run_dir), "evaluation")
    lines = read_lines(folder / EVAL)
    return Evaluation(str(config.model.path), folder, dict(metrics), lines[-1]["answers"] if lines else [])


def difference(after: Evaluation, before: Evaluation) -> dict[str, float]:
    """Mean of after - before over the prompts that both answered, its interval of 95 %, how many there are."""
    a, b = after.worth(), before.worth()
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        return {}
    values = np.array([[a[key], b[key]] for key in both])
    low, high = paired_interval(values[:, 1], values[:, 0])
    return {"mean": float((values[:, 0] - values[:, 1]).mean()), "low": low, "high": high, "prompts": float(len(both)),
            "better": float((values[:, 0] > values[:, 1]).sum()), "worse": float((values[:, 0] < values[:, 1]).sum())}


def told(found: Sequence[Evaluation]) -> Iterator[str]:
    """Lines of a table, for people."""
    after, *others = found
    names = [name for name in after.metrics if not name.endswith(("_low", "_high"))]
    width = max(map(len, names), default=0)
    for name in names:
        values = "  ".join(f"{one.metrics[name]:>10.4g}" if name in one.metrics else f"{'-':>10}"
                           for one in (*others, after))
        low, high = after.metrics.get(f"{name}_low"), after.metrics.get(f"{name}_high")
        bounds = f"   95 %: {low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        yield f"{name:<{width}}  {values}{bounds}"
    for before in others:
        yield f"left: {before.model}; right: {after.model}"
        by = difference(after, before)
        if by:
            yield (f"difference of eval/task_mean, paired over {by['prompts']:.0f} prompts: {by['mean']:+.4g}   "
                   f"95 %: {by['low']:+.4g} to {by['high']:+.4g}; better on {by['better']:.0f}, worse on "
                   f"{by['worse']:.0f}")
    yield f"answers: {after.folder / EVAL}"


def as_json(found: Sequence[Evaluation]) -> str:
    after, *others = found
    values: dict[str, Any] = {"model": after.model, "metrics": after.metrics, "answers": str(after.folder / EVAL)}
    worth = np.array(list(after.worth().values()))
    if len(worth) > 1:
        values["task_mean_95"] = interval(worth)
    for before in others:
        values["against"] = {"model": before.model, "metrics": before.metrics, "answers": str(before.folder / EVAL)}
        values["difference"] = difference(after, before)
    return json.dumps(values, indent=1) + "\n"
