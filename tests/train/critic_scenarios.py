"""What the ranks of a critic do, and those of its policy.

Takes:  a Rank; a folder with a policy in `tied/` and a score model in `scorer/`.
Gives:  as tests.train.scenarios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flux_ray.config import CriticConfig
from flux_ray.records import RolloutGroup
from flux_ray.run.build import critic_config
from flux_ray.train import Critic
from tests.train.batches import rollout_group, scored
from tests.train.scenarios import FIRST, LORA, SECOND, Rank, fill, gradient, weights

PPO: dict[str, Any] = {"algo__name": "ppo", "algo__beta": 0.0, "algo__kl_coef": 0.0}
CLIP_RANGE, LEARNING_RATE = 0.3, 1e-3


def returns_of(group: RolloutGroup) -> list[np.ndarray]:
    rng = np.random.default_rng(group.prompt.uid + 300)
    return [np.where(t.loss_mask, rng.normal(size=t.num_tokens), 0).astype(np.float32) for t in group.trajectories]


def old_values_of(group: RolloutGroup) -> list[np.ndarray]:
    """Not the critic's own: so that the clip binds in the first update."""
    rng = np.random.default_rng(group.prompt.uid + 400)
    return [np.where(t.loss_mask, rng.normal(size=t.num_tokens), 0).astype(np.float32) for t in group.trajectories]


def groups_of(rank: Rank, uids: tuple[int, ...]) -> list[RolloutGroup]:
    mine = uids[:4] if rank.rank == 0 else uids[4:]
    return [rollout_group(uid) for uid in mine]


def critic(rank: Rank, **overrides: Any) -> Critic:
    config = rank.config("tied", PPO | overrides)
    own = CriticConfig(path=str(rank.folder / "scorer"), clip_range=CLIP_RANGE, learning_rate=LEARNING_RATE)
    return Critic(critic_config(replace(config, critic=own)), rank=rank.rank, world_size=rank.world_size,
                  master_address="127.0.0.1", master_port=rank.port, device="cpu")


def step(model: Critic, groups: Sequence[RolloutGroup], done: int = 0) -> dict[str, float]:
    return model.train_step(groups=groups, scores=[scored(g) for g in groups], step=done,
                            values=[old_values_of(g) for g in groups], returns=[returns_of(g) for g in groups]).metrics


def gradients(rank: Rank, stage: int) -> dict[str, float]:
    """The values before, and the first gradient, at a rate of the critic's own."""
    model, groups = critic(rank, train__zero_stage=stage), groups_of(rank, FIRST)
    values = {f"{g.prompt.uid}.{i}": torch.from_numpy(row) for g, of in zip(groups, model.values(groups), strict=True)
              for i, row in enumerate(of)}
    rank.write(f"values_{stage}", values)
    metrics = step(model, groups)
    rank.write(f"critic_{stage}", gradient(model))
    return metrics


def adapted(rank: Rank, name: str, **overrides: Any) -> None:
    """The first gradient of a critic's adapter that isn't 0, and of its head."""
    model = critic(rank, train__lora=LORA, **overrides)
    fill(model)
    step(model, groups_of(rank, FIRST))
    rank.write(f"critic_lora_{name}", gradient(model))


def resume(rank: Rank) -> dict[str, Any]:
    """Several updates a step; a checkpoint, a second step, and the second step again from the checkpoint."""
    several = {"algo__epochs": 2, "algo__mini_batches": 2, "train__zero_stage": 2}
    first = critic(rank, **several)
    step(first, groups_of(rank, FIRST))
    first.save_checkpoint(rank.folder / "critic_checkpoint")
    went_on = step(first, groups_of(rank, SECOND), 1)
    rank.write("critic_went_on", weights(first))
    first.save_model(rank.folder / "critic")
    again = critic(rank, **several)
    again.load_checkpoint(rank.folder / "critic_checkpoint")
    resumed = step(again, groups_of(rank, SECOND), 1)
    rank.write("critic_resumed", weights(again))
    return {"went_on": went_on, "resumed": resumed, "updates": again.engine.num_updates, "step": again.step}


def policy(rank: Rank) -> dict[str, Any]:
    """A policy's step from values: the returns that it leaves; a step of the critic's warm-up, which moves nothing."""
    trainer = rank.trainer(**PPO, algo__gamma=0.9, algo__gae_lambda=0.8)
    groups = groups_of(rank, FIRST)
    given = {"groups": groups, "scores": [scored(g) for g in groups], "reference_logprobs": None,
             "values": [old_values_of(g) for g in groups]}
    report = trainer.train_step(**given, step=0)
    rank.write("returns", {f"{g.prompt.uid}.{i}": torch.from_numpy(row)
                           for g, of in zip(groups, trainer.returns, strict=True) for i, row in enumerate(of)})
    trainer.config = replace(trainer.config, critic=CriticConfig(warmup_steps=5))
    before = weights(trainer)
    still = trainer.train_step(**given, step=1)
    moved = any(not torch.equal(w, before[name]) for name, w in weights(trainer).items())
    return {"metrics": report.metrics, "warm_up": still.metrics, "moved": moved, "step": still.step}


def policy_with_adapter(rank: Rank) -> dict[str, Any]:
    """Two steps whose KL in the reward is to the policy without its adapter, of which no log-probs are given; how the
    KL's weight is adapted in a third, with a critic's warm-up and after it."""
    trainer = rank.trainer(**PPO | {"algo__kl_coef": 0.1}, train__zero_stage=3, train__lora=LORA,
                           train__learning_rate=1e-2)
    groups = groups_of(rank, FIRST)
    given = {"groups": groups, "scores": [scored(g) for g in groups], "reference_logprobs": None,
             "values": [old_values_of(g) for g in groups]}
    steps = [trainer.train_step(**given, step=done).metrics for done in range(2)]
    coefs = []
    for warmup_steps in (5, 0):
        trainer.config = replace(trainer.config, critic=CriticConfig(warmup_steps=warmup_steps),
                                 algo=replace(trainer.config.algo, kl_target=100.0, kl_horizon=100.0))
        trainer.train_step(**given, step=2)
        coefs.append(trainer.kl_coef)
    return {"steps": steps, "coefs": coefs}


def two_ranks(rank: Rank) -> dict[str, Any]:
    result = {str(stage): gradients(rank, stage) for stage in (0, 3)}
    result |= {"resume": resume(rank), "policy": policy(rank)}
    result["policy_with_adapter"] = policy_with_adapter(rank)
    adapted(rank, "0")
    adapted(rank, "3", train__zero_stage=3, train__gradient_checkpointing=True)
    dist.barrier()
    return result


SCENARIOS = {"critic_two_ranks": two_ranks}
