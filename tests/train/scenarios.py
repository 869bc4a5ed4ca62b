"""One rank of a scenario: `python -m tests.train.scenarios NAME WORLD_SIZE PORT FOLDER RANK`.

Takes:  a folder with a model in `model/`.
Gives:  NAME.json (and safetensors beside it) from rank 0.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flux_ray.config import Config, from_dict
from flux_ray.records import StepReport
from flux_ray.train import Trainer
from flux_ray.train import checkpoint as checkpoint_module
from tests.train.batches import reference_logprobs, rollout_group, scored, supervised

BETA_1 = 0.9


class Rank:
    """This process's place, and trainers made in it one after the other."""

    def __init__(self, world_size: int, port: int, folder: Path, rank: int) -> None:
        self.world_size, self.port, self.folder, self.rank = world_size, port, folder, rank

    def trainer(self, **overrides: Any) -> Trainer:
        return Trainer(self.config(**overrides), rank=self.rank, world_size=self.world_size,
                       master_address="127.0.0.1", master_port=self.port, device="cpu")

    def config(self, *, model: str = "model", **overrides: Any) -> Config:
        values: dict[str, Any] = {
            "model": {"path": str(self.folder / model), "logprob_chunk_tokens": 16},
            "rollout": {"temperature": 0.7, "max_tokens": 12},
            "algo": {"beta": 0.1},
            "batch": {"max_tokens_per_micro_batch": 64},
            "train": {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 0.0, "deadline_s": 60.0},
        }
        for dotted, value in overrides.items():
            group, key = dotted.split("__")
            values[group][key] = value
        if values["train"].get("zero_stage") == 3:  # else every parameter of a tiny model would stay whole
            values["train"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return from_dict(copy.deepcopy(values))

    def step(self, trainer: Trainer, *, uids: tuple[int, ...] = tuple(range(6)), split: int = 4) -> StepReport:
        """A step on these groups: the first `split` on rank 0, the rest on the last rank (all of them when alone)."""
        mine = uids if self.world_size == 1 else (uids[:split] if self.rank == 0 else uids[split:])
        groups = [rollout_group(uid, version=trainer.version) for uid in mine]
        return trainer.train_step(groups=groups, scores=[scored(g) for g in groups],
                                  reference_logprobs=[reference_logprobs(g) for g in groups], version=trainer.version)

    def gradient(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """The first update's gradient, read from AdamW's first moment."""
        return {name.removeprefix("exp_avg."): (tensor / (1 - BETA_1)).clone()
                for name, tensor in checkpoint_module._tensors(trainer.engine) if name.startswith("exp_avg.")}

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.rank == 0:
            save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"{name}.safetensors")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.iter_weights(20_000)}


def alone(rank: Rank) -> dict[str, Any]:
    """World size 1: the gradient under different micro-batches and layouts."""
    variants: dict[str, dict[str, Any]] = {
        "one": {}, "micro_1": {"batch__micro_batch_size": 1}, "micro_8": {"batch__micro_batch_size": 8},
        "block_diagonal": {"model__layout": "block_diagonal"}, "checkpointing": {"train__gradient_checkpointing": True},
    }
    metrics = {}
    for name, overrides in variants.items():
        trainer = rank.trainer(**overrides)
        metrics[name] = rank.step(trainer).metrics
        rank.write(name, rank.gradient(trainer))
    return metrics


SCENARIOS: dict[str, Callable[[Rank], dict[str, Any]]] = {"alone": alone}


def together(rank: Rank) -> dict[str, Any]:
    """World size 2: the gradient under every ZeRO stage, and with a rank that has no groups."""
    result = {}
    for stage in range(4):
        trainer = rank.trainer(train__zero_stage=stage, batch__micro_batch_size=3)
        result[f"zero_{stage}"] = rank.step(trainer).metrics
        rank.write(f"zero_{stage}", rank.gradient(trainer))
    for stage in (0, 3):
        trainer = rank.trainer(train__zero_stage=stage)
        result[f"no_groups_{stage}"] = rank.step(trainer, split=6).metrics
        rank.write(f"no_groups_{stage}", rank.gradient(trainer))
    return result


SCENARIOS["together"] = together


def resume(rank: Rank) -> dict[str, Any]:
    """Under every ZeRO stage: a step, a checkpoint, a second step; and the second step again from the checkpoint."""
    result = {}
    for stage in range(4):
        trainer = rank.trainer(train__zero_stage=stage, train__max_grad_norm=1.0)
        rank.step(trainer)
        trainer.save_checkpoint(rank.folder / f"checkpoint_{stage}")
        went_on = rank.step(trainer, uids=tuple(range(6, 12)))
        rank.write(f"went_on_{stage}", weights(trainer))
        again = rank.trainer(train__zero_stage=stage, train__max_grad_norm=1.0)
        again.load_checkpoint(rank.folder / f"checkpoint_{stage}")
        resumed = rank.step(again, uids=tuple(range(6, 12)))
        rank.write(f"resumed_{stage}", weights(again))
        result[str(stage)] = {"went_on": went_on.metrics, "resumed": resumed.metrics, "version": again.version}
    return result


SCENARIOS["resume"] = resume


def main() -> None:
    name, world_size, port, folder, number = sys.argv[1:]
    rank = Rank(int(world_size), int(port), Path(folder), int(number))
    result = SCENARIOS[name](rank)
    if rank.rank == 0:
        (rank.folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
