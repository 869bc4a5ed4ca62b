"""`flux-ray replay RUN --step N --left-out`: a step that was left out, because a number was not finite, once more.

Takes:  the run's folder, its config; the batch that each rank has kept of the step (train/skipped.py).
Gives:  `left_out`: lines that say what is not finite, and where.
Knows:  the weights are those of the newest checkpoint up to the step, or the model's own.
Never:  changes the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flux_ray import algo
from flux_ray.config import Config, PolicyGradientConfig
from flux_ray.errors import UserError
from flux_ray.replay.again import NORM, trainer_at
from flux_ray.run import checkpoint as saved
from flux_ray.run_dir import BAD_BATCHES
from flux_ray.train import Trainer
from flux_ray.train.policy_step import MiniBatch, PolicyObjective
from flux_ray.train.skipped import KeptSequence, read

#: Ranks' shares of the first update that was left out: what is computed again.
Shares = list[list[KeptSequence]]


def left_out(config: Config, run: Path, step: int) -> list[str]:
    """`step`: as metrics.jsonl counts. UserError where nothing is kept of it, or it is of a score model."""
    if config.is_score:
        raise UserError(f"algo.name={config.algo.name}: a policy's batches are computed again, not those of a score "
                        f"model; they lie in {run / BAD_BATCHES}")
    shares, why = _kept(run, step)
    checkpoint = _newest(run, step)
    at = "model.path" if checkpoint is None else str(checkpoint)
    done = 0 if checkpoint is None else saved.step_of(checkpoint)
    later = "" if done == step else f", the nearest before (after {done} steps, not {step})"
    lines = [f"step {step}, update {why['update']}: {why['why']}", f"with the weights of {at}{later}:"]
    with trainer_at(config, checkpoint) as trainer:
        found = list(_of_sequences(trainer, config, shares))
        lines += found or [f"all {sum(map(len, shares))} sequences: every number that goes in, and every log-prob of "
                           "the model, is finite"]
        if isinstance(config, PolicyGradientConfig):
            lines.append(f"the gradient is {'finite' if _has_gradient(trainer, config, shares) else 'not finite'}")
    return lines


def _kept(run: Path, step: int) -> tuple[Shares, dict[str, object]]:
    """What each rank has kept of the first update that the step left out, and what was said of it."""
    folder, stem = run / BAD_BATCHES, f"step-{step + 1:06d}-trainer"  # named by the steps that were done then
    files = sorted(folder.glob(f"{stem}-rank-*.safetensors"))
    if not files or not (folder / f"{stem}.json").is_file():
        others = sorted(int(file.name.split("-")[1]) - 1 for file in folder.glob("step-*-trainer.json"))
        raise UserError(f"{folder}: nothing is kept of step {step}" + (f"; there are steps {others}" if others else ""))
    told = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    return [read(file, 0) for file in files], told["skipped"][0]


def _newest(run: Path, step: int) -> Path | None:
    return next((path for path in reversed(saved.whole(run / "checkpoints")) if saved.step_of(path) <= step), None)


def _of_sequences(trainer: Trainer, config: Config, shares: Shares) -> Iterator[str]:
    """A line for each sequence with a number that isn't finite."""
    for rank, sequences in enumerate(shares):
        for sequence in sequences:
            values = {name: value for name, value in sequence.values.items() if value.is_floating_point()}
            values["the model's log-probs"] = _logprobs(trainer, config, sequence)
            wrong = [f"{name} at {_places(value)}" for name, value in values.items() if not _is_finite(value)]
            if wrong:
                yield (f"rank {rank}, its sequence {sequence.place} of {len(sequence.values['token_ids'])} tokens: not "
                       f"finite: {', '.join(wrong)}")


def _logprobs(trainer: Trainer, config: Config, sequence: KeptSequence) -> Tensor:
    (logprobs_S,) = trainer.engine.forward([sequence.micro_batch], temperature=_temperature(config),
                                           with_entropy=False)
    return logprobs_S


def _temperature(config: Config) -> float:
    return config.rollout.temperature if isinstance(config, PolicyGradientConfig) else 1.0


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _places(values_T: Tensor) -> str:
    """
    >>> _places(torch.tensor([0.0, float("nan"), float("inf"), 1.0]))
    '2 tokens, the first is token 1 (from 0)'
    """
    found = torch.nonzero(~torch.isfinite(values_T)).flatten().tolist()
    count = "1 token" if len(found) == 1 else f"{len(found)} tokens"
    return f"{count}, the first is token {found[0]} (from 0)"


def _has_gradient(trainer: Trainer, config: PolicyGradientConfig, shares: Shares) -> bool:
    """Whether an update on all ranks' sequences can be made."""
    sequences: Sequence[KeptSequence] = [one for share in shares for one in share]
    micro_batches = [one.micro_batch for one in sequences]
    old = None
    if algo.needs_old_logprobs(config.algo):  # those of the weights that are here: the batch has none
        old = [_logprobs(trainer, config, one) for one in sequences]
    objective = PolicyObjective(config, algo.resolve(config.algo), MiniBatch(micro_batches, old), measure_gap=False)
    metrics = trainer.engine.update(micro_batches, objective, total_updates=config.driver.num_steps,
                                    temperature=_temperature(config), with_entropy=True)
    return NORM in metrics
