"""`flux-ray replay RUN --step N [OPTION=VALUE ...]`: a step's numbers from its rollouts on disk, without an engine.

Takes:  a run's folder, a step, other options of the algorithm or the rewards.
Gives:  `replay`: the metrics of the step beside those of the run; `command`.
Knows:  with the run's own options the numbers are the run's. The log-probs are those that the run wrote down, of each
        sample's first update.
Never:  changes anything in the run's folder.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from flux_ray import config as configs
from flux_ray import names, run_dir
from flux_ray.config import Config, PolicyGradientConfig, PPOConfig, changed
from flux_ray.errors import UserError
from flux_ray.observability import rollouts
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.observability.rollouts import TRAINED, Rollout
from flux_ray.observability.run_folder import METRICS, read_lines
from flux_ray.plugins import load_plugins
from flux_ray.replay.again import NORM, gradient_norm, scored_again
from flux_ray.replay.formulas import metrics_of, scores_of
from flux_ray.replay.left_out import left_out

USAGE = "flux-ray replay RUN --step N [--score] [--gradient] [--left-out] [OPTION=VALUE ...]"
SECTIONS = ("algo", "reward")  # whose options may be others than the run's
WITHOUT_SCORING = ("reward.combine",)  # it is applied to parts that are known


@dataclass
class Replayed:
    """A step's metrics by name. Those that the run has too are to be compared; `notes` say what can't be."""

    step: int
    metrics: dict[str, float]
    run: dict[str, float]
    notes: list[str] = field(default_factory=list)


def replay(
    run: str | Path, *, step: int, score: bool = False, gradient: bool = False,
    options: Mapping[str, object] | None = None,
) -> Replayed:
    """What a step would have been under these options, from the rollouts that the run has kept of it.

    Args:
        run: The run's folder.
        step: As metrics.jsonl counts, from 0.
        score: Call the reward functions again, on the stored texts. Other options of rewards do so by themselves.
        gradient: Compute the gradient's norm too, where the weights before the step are known.
        options: Of `algo` and `reward`, by any of their names. Another `algorithm` brings its preset.

    Raises:
        UserError: There is no such run or step, an option is unknown or none of these sections, or a log-prob is asked
            for that the run has not kept.
    """
    path = Path(run).expanduser().absolute()
    config, given = _config(path, options or {})
    if not isinstance(config, PolicyGradientConfig):
        raise UserError(f"algo.name={config.algo.name}: only runs that roll out keep rollouts to replay")
    load_plugins(config.plugins)
    found = rollouts.groups_of(rollouts.read(path, step))
    trained = [one for one in found if one.outcome == TRAINED]
    if not trained:
        raise UserError(f"{path}: no group of step {step} that was trained on is kept")
    line = next((line for line in read_lines(path / METRICS) if line["step"] == step), {})
    notes = _missing(config, trained, step)
    if config.algo.kl_target is not None and "actor/kl_coef" in line and "algo.kl_coef" not in given:
        config = changed(config, {"algo.kl_coef": float(line["actor/kl_coef"])})
    if score or any(key.startswith("reward.") and key not in WITHOUT_SCORING for key in given):
        trained = asyncio.run(scored_again(config, trained, step))
    scores = [scores_of(one) for one in trained]
    metrics = reward_metrics(scores, "reward") | length_metrics(scores, "rollout")
    if trained[0].made and trained[0].made["policy_logprobs"] is not None:
        metrics |= metrics_of(config, trained, step, notes)
        norm = gradient_norm(config, path, trained, step) if gradient else "--gradient computes it"
        if isinstance(norm, float):
            metrics[NORM] = norm
        else:
            notes.append(f"{NORM} is not replayed: {norm}")
    else:
        notes.append("no update was made of these groups (a critic learned alone): there is no loss")
    own = {name: float(line[name]) for name in metrics if isinstance(line.get(name), (int, float))}
    return Replayed(step, metrics, own, notes)


def _config(path: Path, options: Mapping[str, object]) -> tuple[Config, set[str]]:
    """The run's config with these options, and which ones they are."""
    keys = [key for key, _ in configs.options()]
    flat = names.flatten(options, options=keys)
    for key in flat:
        if key.partition(".")[0] not in SECTIONS:
            raise UserError(f"{key}: what was sampled stays as it is, so a replay takes options of "
                            f"{' and '.join(SECTIONS)} alone")
    before = names.flatten(run_dir.saved_config(str(path), named=""), options=keys)
    algorithm = flat.get("algo.name", before["algo.name"])
    if algorithm != before["algo.name"]:
        before = {key: value for key, value in before.items() if not key.startswith("algo.")}
        flat = {**names.flatten(configs.preset(algorithm), options=keys), **flat}
        if configs.objective_of(algorithm) is PPOConfig:
            raise UserError(f"algo.name={algorithm}: its advantages need a critic's values, which the run hasn't")
    config = configs.check_values(configs.from_dict(flat, before={**before, "run_dir": None, "resume": None}))
    return config, set(flat)


def _missing(config: PolicyGradientConfig, trained: Sequence[Rollout], step: int) -> list[str]:
    notes, wanted = [], config.batch.prompts_per_step
    if len(trained) < wanted:
        notes.append(f"{len(trained)} of the step's {wanted} groups are kept (observability.rollouts_share="
                     f"{config.observability.rollouts_share:g}): the numbers are theirs alone")
    if config.algo.epochs > 1:
        notes.append(f"the step passed {config.algo.epochs} times over its batch: the log-probs, and so the loss and "
                     "what is clipped, are of the first pass")
    return notes


def command(arguments: list[str]) -> int:
    """`flux-ray replay ...`; the exit code."""
    parser = argparse.ArgumentParser(prog="flux-ray replay", usage=USAGE, add_help=False, exit_on_error=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--step", type=int)
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--left-out", action="store_true")
    words = [word for word in arguments if "=" not in word or word.startswith("-")]
    try:
        asked, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{USAGE}: {error}") from None
    if asked.run is None or asked.step is None or unknown:
        raise UserError(USAGE)
    overrides = [word for word in arguments if word not in words]
    options = _given(overrides)
    if asked.left_out:
        path = Path(asked.run).expanduser().absolute()
        config, _ = _config(path, options)
        load_plugins(config.plugins)
        lines = left_out(config, path, asked.step)
    else:
        lines = told(replay(asked.run, step=asked.step, score=asked.score, gradient=asked.gradient, options=options))
    print("\n".join(lines))
    return 0


def _given(overrides: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE with the value as YAML has it; `algo=NAME` is the algorithm's name."""
    pairs = [word.partition("=") for word in overrides]
    return {"algo.name" if key == "algo" else key: yaml.safe_load(value) for key, _, value in pairs}


def told(found: Replayed) -> list[str]:
    """A table for people: each metric as it was, as it is replayed, and the difference."""
    lines = [f"{'step ' + str(found.step):<28} {'run':>14} {'replay':>14} {'difference':>12}"]
    for name, value in found.metrics.items():
        own = found.run.get(name)
        was, by = ("", "") if own is None else (f"{own:.6g}", f"{value - own:+.2g}")
        lines.append(f"{name:<28} {was:>14} {value:>14.6g} {by:>12}")
    return [*lines, *found.notes]
