"""Evaluates a model, alone or beside the one it was trained from: `flux-ray eval`, `flux_ray.evaluate`.

Takes:  a model, what to evaluate on, options; the other model to compare with.
Gives:  EvalResult: metrics with intervals, the paired difference; a table; evaluation.json beside the samples.
Knows:  two models answer the same prompts with the same seeds: their difference is taken prompt by prompt.
Never:  trains; holds a loop of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flux_ray import run_dir
from flux_ray.api import FluxTrainer
from flux_ray.config import Config, changed, options_of
from flux_ray.errors import UserError
from flux_ray.models_of_runs import config_for, parsed
from flux_ray.observability.estimates import interval
from flux_ray.observability.eval_metrics import HIGH, LOW
from flux_ray.observability.run_folder import EVAL_SAMPLES, read_lines

RESULT = "evaluation.json"
AGAINST = "against"  # folder of the other model's evaluation
USAGE = """\
flux-ray eval model=PATH data=FILE [OPTION=VALUE ...] [--against BASE]

  flux-ray eval model=runs/mine data=test.jsonl eval.num_samples=8
  flux-ray eval model=runs/mine data=test.jsonl eval.temperature=0 --against Qwen/Qwen3-0.6B

  model              a run's folder, whose options hold here too, or any model
  data               what to evaluate on; none: the run's eval.data. Several sets: see eval.data
  --against BASE     a second model on the same prompts, and the paired difference of the two
  run_dir            where the results are to lie; none: runs/DATE_TIME
"""


@dataclass(frozen=True)
class Difference:
    """The model less the base, over prompts that both have a value for.

    Attributes:
        difference: Mean over prompts, in the metric's unit.
        low, high: Ends of its 95 % interval (paired bootstrap).
        num_prompts: How many prompts.
    """

    difference: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation gave.

    Attributes:
        metrics: `eval/*` of the model, as docs/metrics.md has them.
        folder: Where eval_samples.jsonl (each prompt with all samples) and the logs lie.
        against: `eval/*` of the other model; empty without one.
        differences: Metric ► the paired difference. Empty without another model, and where nothing is sampled.
    """

    metrics: dict[str, float]
    folder: Path
    against: dict[str, float] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)

    def table(self) -> str:
        """For people: a row a metric; with another model a paired one."""
        rows = list(_compared(self) if self.against else _alone(self.metrics))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                               zip(row[1:], widths[1:], strict=True))]).rstrip()
                         for row in rows)


def evaluate(model: str, data: Any = None, *, against: str | None = None, **options: Any) -> EvalResult:
    """Evaluate a model on prompts, completions or pairs; nothing is trained.

    Args:
        model: A run's folder, whose options hold here too, or any model.
        data: As `eval.data` has it: a file, or several sets by name. None takes the run's `eval.data`.
        against: Another model, on the same data with the same options.
        options: As FluxConfig has them, with sections nested.

    Raises:
        UserError: Something that the user can mend; before anything starts, wherever it can be known then.
        RunFailed: An evaluation broke.

    Examples:
        >>> result = evaluate("runs/mine", "test.jsonl", eval={"num_samples": 8})   # doctest: +SKIP
        >>> result.metrics["eval/pass@8"]   # doctest: +SKIP
        0.75
    """
    given = options if data is None else {**options, "eval.data": data}
    config = run_dir.claim(_without_training(config_for(model, given)))
    others = [_without_training(config_for(against, {**_options(config), "run_dir": str(Path(str(config.run_dir),
                                                                                              AGAINST))}))
              ] if against is not None else []
    metrics, lines = _evaluated(config)
    result = EvalResult(metrics, _folder(config))
    for other in others:
        theirs, their_lines = _evaluated(other)
        result = EvalResult(metrics, result.folder, theirs, dict(_differences(lines, their_lines)))
    file = Path(str(config.run_dir), RESULT)
    file.write_text(json.dumps(_plain(asdict(result)), indent=2, default=str) + "\n", encoding="utf-8")
    return result


def command(arguments: Sequence[str]) -> None:
    """`flux-ray eval ...`."""
    words = list(arguments)
    if not words or {"-h", "--help"} & set(words):
        return print(USAGE, end="")
    against = None
    if "--against" in words:
        place = words.index("--against")
        against = words[place + 1] if place + 1 < len(words) else None
        if not against or "=" in against:
            raise UserError("--against BASE: the model to compare with, a folder or a hub name")
        del words[place : place + 2]
    options = parsed(words)
    model = options.pop("model", None) or options.pop("model.path", None)
    if not model:
        raise UserError("flux-ray eval: model is missing (model=PATH: a run's folder or a model)")
    result = evaluate(str(model), options.pop("data", None), against=against, **options)
    print(result.table())
    print(f"\nsamples in {result.folder / EVAL_SAMPLES}, all of this in {result.folder.parent / RESULT}")


def _options(config: Config) -> dict[str, Any]:
    """Options of a config that another model is evaluated with as well."""
    from flux_ray.config import value_of

    return {key: value_of(config, key) for key, _ in options_of(type(config)) if key not in ("model.path",)}


def _without_training(config: Config) -> Config:
    """Evaluated as it is: an option of training alone may not fit here."""
    own = dict(options_of(type(config)))
    idle = {"eval.every": 0, "eval.patience": 0, "checkpoint.best": None}
    return changed(config, {key: value for key, value in idle.items() if key in own})


def _folder(config: Config) -> Path:
    return Path(str(config.run_dir), "evaluation")


def _evaluated(config: Config) -> tuple[dict[str, float], list[dict[str, Any]]]:
    metrics = FluxTrainer(config).evaluate()
    return metrics, read_lines(_folder(config) / EVAL_SAMPLES)


def _differences(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
                 ) -> Iterator[tuple[str, Difference]]:
    """Of all prompts that both have a line for, and of each set."""
    other = {(line["set"], line["row"]): line["values"] for line in theirs}
    pairs = [(line["set"], line["values"], other[line["set"], line["row"]])
             for line in ours if (line["set"], line["row"]) in other]
    sets = dict.fromkeys(name for name, _, _ in pairs if name)
    for prefix, chosen in {"eval": None, **{f"eval/{name}": name for name in sets}}.items():
        of_set = [(mine, yours) for name, mine, yours in pairs if chosen in (None, name)]
        for metric in of_set[0][0] if of_set else ():
            gaps = [mine[metric] - yours[metric] for mine, yours in of_set
                    if mine[metric] is not None and yours.get(metric) is not None]
            if gaps:
                yield f"{prefix}/{metric}", Difference(float(np.mean(gaps)), *interval(gaps), len(gaps))


def _alone(metrics: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    yield "metric", "value", "95 % interval"
    for name, value in metrics.items():
        if not name.endswith((LOW, HIGH)):
            ends = [metrics[name + end] for end in (LOW, HIGH) if name + end in metrics]
            yield name, _number(value), _interval(ends)


def _compared(result: EvalResult) -> Iterator[tuple[str, ...]]:
    yield "metric", "model", "base", "difference", "95 % interval", "prompts"
    for name, value in result.metrics.items():
        if name.endswith((LOW, HIGH)) or name not in result.against:
            continue
        base, pair = result.against[name], result.differences.get(name)
        difference = pair.difference if pair else value - base
        yield (name, _number(value), _number(base), f"{difference:+.4g}",
               _interval([pair.low, pair.high] if pair else []), str(pair.num_prompts) if pair else "")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.4g}, {ends[1]:.4g}]" if ends else ""


def _plain(value: Any) -> Any:
    """What JSON has no number for becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
