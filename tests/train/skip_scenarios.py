"""What ranks do with numbers that are not finite.

Takes:  a Rank, on each of two processes.
Gives:  the scenario `skips`: steps that were left out, models that were given to nobody.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from flux_ray.train import Trainer, checkpoint, full_weights
from tests.train.scenarios import SECOND, Rank, weights

#: Ways in which gradients are kept: each must forget those of an update that is left out.
LEFT_OUT: dict[str, dict[str, Any]] = {
    **{f"zero_{stage}": {"train__zero_stage": stage} for stage in range(4)}, "bf16": {"model__dtype": "bfloat16"},
    "offloaded": {"train__zero_stage": 2, "train__deepspeed": {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
}


def left_out(rank: Rank, name: str, **overrides: Any) -> dict[str, Any]:
    """A step in which rank 1's last group has no finite loss, between two that have: what it says and changes."""
    run_dir = rank.folder / f"run_{name}"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").touch()
    trainer = rank.trainer(train__schedule="linear", **overrides)
    trainer.config = dataclasses.replace(trainer.config, run_dir=str(run_dir))
    rank.step(trainer)
    before, updates = whole_state(trainer), trainer.engine.num_updates
    report = rank.step(trainer, SECOND, spoil=SECOND[-1])
    after = whole_state(trainer)
    stayed = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    went_on = rank.step(trainer, SECOND)
    never = rank.trainer(train__schedule="linear", **overrides)
    rank.step(never)
    never.step += 1
    rank.step(never, SECOND)
    wanted = weights(never)
    same = all(torch.equal(tensor, wanted[key]) for key, tensor in weights(trainer).items())
    mine = [stayed, trainer.engine.num_updates - updates, same, report.step, report.metrics]
    everyone: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everyone, mine)
    return {"ranks": everyone, "went_on": went_on.metrics}


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, their fp32 masters and the moments."""
    return {**{name: tensor.clone() for name, tensor in checkpoint._tensors(trainer.engine)}, **weights(trainer)}


def spoilt_weight(rank: Rank, stage: int) -> list[str]:
    """What a rank says when it is to publish or to save a model with one nan, which lies on one rank alone."""
    trainer = rank.trainer(train__zero_stage=stage)
    if rank.rank == 1:
        parameter = full_weights.parameters(trainer.model)[2][1]
        getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = math.nan
    said = []
    for give in (trainer.check_weights, lambda: trainer.save_checkpoint(rank.folder / f"spoilt_{stage}"),
                 lambda: trainer.save_model(rank.folder / f"spoilt_{stage}")):
        try:
            give()
        except RuntimeError as error:
            said.append(str(error))
    return said


def skips(rank: Rank) -> dict[str, Any]:
    says: list[Any] = [None] * rank.world_size
    dist.all_gather_object(says, {stage: spoilt_weight(rank, stage) for stage in (0, 3)})
    return {"says": says, "left_out": {name: left_out(rank, name, **overrides) for name, overrides in LEFT_OUT.items()}}


SCENARIOS: dict[str, Callable[[Rank], dict[str, Any]]] = {"skips": skips}
