"""What a replay does anew: the rewards of stored texts, the gradient at the weights before the step.

Takes:  a config; groups from disk; the run's folder.
Gives:  `scored_again`; `gradient_norm`, or why there is none; `trainer_at` some weights.
Never:  changes the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flux_ray.cluster.plan import TRAINER
from flux_ray.config import Config, PolicyGradientConfig, PPOConfig, changed
from flux_ray.data import PromptSource
from flux_ray.errors import UserError
from flux_ray.model import context_length, load_tokenizer
from flux_ray.names import reward_model_path
from flux_ray.observability.rollouts import Rollout
from flux_ray.ports import reserve
from flux_ray.records import Responses
from flux_ray.replay.formulas import batch_of, scores_of
from flux_ray.reward import RewardWorker
from flux_ray.run import checkpoint as saved
from flux_ray.train import Trainer

NORM = "train/grad_norm"
LOCAL = "127.0.0.1"


async def scored_again(config: PolicyGradientConfig, trained: Sequence[Rollout], step: int) -> list[Rollout]:
    """The groups with what the reward functions say of their texts now.

    The prompts' columns come from data.train, which must be as it was. UserError where it isn't, or where a reward
    is a model.
    """
    models = [name for name in config.reward.functions if reward_model_path(name) is not None]
    if models:
        raise UserError(f"reward.functions={models}: a replay scores by functions alone, and starts no reward model")
    tokenizer = load_tokenizer(str(config.model.tokenizer or config.model.path))
    context = config.rollout.max_model_len or context_length(str(config.model.path))
    prompts = PromptSource.from_config(config, tokenizer, context_length=context)
    worker = RewardWorker(config)
    try:
        return list(await asyncio.gather(*(_scored(worker, prompts, one, step) for one in trained)))
    finally:
        worker.close()


async def _scored(worker: RewardWorker, prompts: PromptSource, one: Rollout, step: int) -> Rollout:
    group = one.group
    prompt = prompts.prompt(group.prompt.uid)
    if not np.array_equal(prompt.token_ids, group.prompt.token_ids):
        raise UserError(f"{prompts.source}: {prompt.where} isn't what the run sampled from: the data have changed, so "
                        "the rewards can't be computed again")
    before = scores_of(one)
    scores = await worker.score(Responses(
        prompt, tuple(one.texts), tuple(t.token_ids for t in group.trajectories),
        tuple(t.prompt_length for t in group.trajectories), tuple(t.finish_reason for t in group.trajectories),
        before.num_loss_tokens, step))
    return replace(one, scored=replace(before, rewards=scores.rewards, task_rewards=scores.task_rewards,
                                       parts=scores.parts))


def gradient_norm(config: PolicyGradientConfig, run: Path, trained: Sequence[Rollout], step: int) -> float | str:
    """The gradient's norm before clipping, at the weights before the step; or why it can't be had."""
    checkpoint = saved.checkpoint_folder(run / "checkpoints", step)
    why = _why_not(config, checkpoint, trained, step)
    if why is not None:
        return why
    with trainer_at(config, checkpoint if step else None) as trainer:
        trainer.kl_coef = config.algo.kl_coef
        batch = batch_of(config, trained, step)
        report = trainer.train_step(groups=batch.groups, scores=batch.scores,
                                    reference_logprobs=batch.reference_logprobs, step=step)
    return report.metrics.get(NORM, f"the update isn't finite at {checkpoint.name}")


@contextlib.contextmanager
def trainer_at(config: Config, checkpoint: Path | None) -> Iterator[Trainer]:
    """One rank alone with a checkpoint's weights; None: with those of model.path."""
    device = "cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu"
    alone = changed(config, {"run_dir": None, "train.num_ranks": 1, "train.zero_stage": 0})
    trainer = Trainer(alone, rank=0, world_size=1, master_address=LOCAL, master_port=reserve(LOCAL), device=device)
    try:
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint / TRAINER)
        yield trainer
    finally:
        trainer.close()


def _why_not(
    config: PolicyGradientConfig, checkpoint: Path, trained: Sequence[Rollout], step: int,
) -> str | None:
    if step and checkpoint not in saved.whole(checkpoint.parent):
        return f"no checkpoint is right before step {step} ({checkpoint} isn't there, or isn't whole)"
    if not step and config.model.path is None:
        return "model.path is missing"
    if len({one.update for one in trained}) > 1 or config.algo.epochs * config.algo.mini_batches > 1:
        return "the step has several updates: the weights before the later ones aren't kept"
    if isinstance(config, PPOConfig):
        return "a critic's values aren't kept"
    if config.algo.router_replay:
        return "the experts that engines chose aren't kept (algo.router_replay)"
    return "this process has a process group of torch already" if dist.is_initialized() else None
