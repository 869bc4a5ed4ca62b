"""What the ranks of a policy do, on one rank and on two.

Takes:  a Rank; a folder with models in `tied/` and `untied/`.
Gives:  a scenario's result; safetensors in the folder, from rank 0; what they should be is the tests' to say.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from flux_ray import register_adv_estimator
from flux_ray.config import OFFLINE, Config, from_dict
from flux_ray.model.scoring import scoring_samples
from flux_ray.records import StepReport
from flux_ray.train import Trainer, checkpoint, full_weights
from tests.train.batches import reference_logprobs, rollout_group, scored, supervised

BETA_1 = 0.9
FIRST, SECOND = tuple(range(6)), tuple(range(6, 12))  # uids of the groups of two steps
PARTS = (((5, 0), (3,)), ((), (1,)), ((4, 2), ()))  # of FIRST, by rank: now and then one has nothing
LORA = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "o_proj", "up_proj"]}
#: Steps of other kinds than grpo's: ratios per sequence, whitening over ranks, KL in the reward, corrections.
KINDS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"algo__old_logprobs": "sampler", "algo__dual_clip": 3.0},
    "dapo": {"algo__name": "dapo", "algo__beta": 0.0, "algo__mask_truncated": True, "algo__off_policy": "tis"},
    "dr_grpo": {"algo__name": "dr_grpo", "algo__entropy_coef": 0.01},
    "gspo": {"algo__name": "gspo", "algo__beta": 0.0, "algo__old_logprobs": "sampler"},
    "gspo_token": {"algo__name": "gspo_token", "algo__off_policy": "tis", "algo__off_policy_level": "sequence"},
    "rloo": {"algo__name": "rloo", "algo__beta": 0.0, "algo__kl_coef": 0.05},
    "reinforce": {"algo__name": "reinforce", "algo__beta": 0.0},
    "reinforce_pp": {"algo__name": "reinforce_pp", "algo__beta": 0.0, "algo__kl_coef": 0.05},
    "reinforce_pp_baseline": {"algo__name": "reinforce_pp_baseline", "algo__kl_estimator": "k2"},
    "cispo": {"algo__name": "cispo", "algo__off_policy": "icepop", "algo__clip_range_high": 4.0},
    "own": {"algo__estimator": "over_the_batch", "algo__beta": 0.0},
    "own_of_groups": {"algo__estimator": "over_groups", "algo__beta": 0.0},
}
#: Counted by tokens and by sequences, with old log-probs and without.
STREAMED_KINDS = ("dapo", "gspo", "rloo", "own_of_groups")


@register_adv_estimator("over_the_batch")
def over_the_batch(token_level_rewards, response_mask, *, reduce, **_):  # type: ignore[no-untyped-def]
    """A user's, who thinks of no ranks: statistics over all rows that it is shown, which can't be none."""
    scores = token_level_rewards.sum(-1)
    assert torch.equal(reduce(scores), scores), "what is summed over ranks would be counted twice"
    advantages = ((scores - scores.mean()) / scores.max())[:, None] * response_mask
    return advantages, advantages


@register_adv_estimator("over_groups", needs_groups=True, needs_whole_batch=False)
def over_groups(token_level_rewards, response_mask, *, index, **_):  # type: ignore[no-untyped-def]
    """A user's, which can't be shown no rows."""
    scores = token_level_rewards.sum(-1)
    medians = torch.stack([scores[index == group].median() for group in index])
    advantages = (scores - medians)[:, None] * response_mask
    return advantages, advantages


class Rank:
    """This process's place, and trainers made in it one after the other."""

    def __init__(self, world_size: int, port: int, folder: Path, rank: int) -> None:
        self.world_size, self.port, self.folder, self.rank = world_size, port, folder, rank

    def trainer(self, *, model: str = "tied", **overrides: Any) -> Trainer:
        return Trainer(self.config(model, overrides), rank=self.rank, world_size=self.world_size,
                       master_address="127.0.0.1", master_port=self.port, device="cpu")

    def config(self, model: str, overrides: dict[str, Any]) -> Config:
        offline = overrides.get("algo__name") in OFFLINE
        values: dict[str, Any] = {
            "model": {"path": str(self.folder / model)},
            "rollout": {} if offline else {"temperature": 0.7, "max_tokens": 12},
            "algo": {} if offline else {"beta": 0.1},
            "batch": {"max_tokens_per_micro_batch": 64},
            "train": {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 0.0, "deadline_s": 60.0},
        }
        if overrides.get("algo__name") != "reward_model":
            values["model"]["logprob_chunk_tokens"] = 16
        for dotted, value in overrides.items():
            group, key = dotted.split("__")
            values[group][key] = value
        if values["train"].get("zero_stage") == 3:  # else every parameter of a tiny model would stay whole
            values["train"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return from_dict(copy.deepcopy(values))

    def step(self, trainer: Trainer, uids: tuple[int, ...] = FIRST, *, split: int = 4, spoil: int = -1) -> StepReport:
        """A step: the first `split` groups are rank 0's, the rest rank 1's. The group `spoil` has a nan reference."""
        mine = uids if self.world_size == 1 else (uids[:split] if self.rank == 0 else uids[split:])
        return trainer.train_step(**self.part(trainer, mine, spoil))

    def step_in_parts(self, trainer: Trainer) -> StepReport:
        """The groups of `step` as they might come, PARTS."""
        *early, last = [self.part(trainer, of_rank[self.rank]) for of_rank in PARTS]
        for part in early:
            trainer.accumulate(**part)
        return trainer.train_step(**last)

    def part(self, trainer: Trainer, uids: tuple[int, ...], spoil: int = -1, *, version: int | None = None,
             ) -> dict[str, Any]:
        """`version`: that sampled the groups, where it is not the step's own number."""
        groups = [rollout_group(uid, version=trainer.step if version is None else version) for uid in uids]
        reference = [[row + (np.nan if g.prompt.uid == spoil else 0) for row in reference_logprobs(g)] for g in groups]
        return {"groups": groups, "scores": [scored(g) for g in groups], "reference_logprobs": reference,
                "step": trainer.step}

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.rank == 0:
            save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"{name}.safetensors")


def gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The first update's gradient, read from AdamW's first moment."""
    return {name.removeprefix("exp_avg."): (tensor / (1 - BETA_1)).clone()
            for name, tensor in checkpoint._tensors(trainer.engine) if name.startswith("exp_avg.")}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.iter_weights(20_000)}


def gradients(rank: Rank, variants: dict[str, dict[str, Any]], split: int = 4) -> dict[str, Any]:
    """The first gradient under each variant of the config, written by its name."""
    metrics = {}
    for name, overrides in variants.items():
        trainer = rank.trainer(**overrides)
        metrics[name] = rank.step(trainer, split=split).metrics
        rank.write(name, gradient(trainer))
    return metrics


def streamed(rank: Rank, stages: tuple[int, ...], more: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same steps in parts: the gradient of these stages, in fp32 and bf16, and of more variants.

    One sample a micro-batch: how samples lie side by side changes the last bits of their log-probs.
    """
    variants = {f"streamed_{s}": {"train__zero_stage": s} for s in stages} | {
        f"streamed_bf16_{s}": {"model__dtype": "bfloat16", "train__zero_stage": s} for s in stages if s}
    metrics = {}
    for name, overrides in {**variants, **more}.items():
        trainer = rank.trainer(**{"batch__micro_batch_size": 1} | overrides)
        metrics[name] = rank.step_in_parts(trainer).metrics
        rank.write(name, gradient(trainer))
    return metrics


def fill(trainer: Trainer) -> None:
    """Factors that are not 0, the same wherever they lie; moments that are."""
    checkpoint._prepare_moments(trainer.engine)
    for i, (_, parameter) in enumerate(full_weights.parameters(trainer.model)):
        values = 0.1 * torch.randn(full_weights.whole_shape(parameter), generator=torch.Generator().manual_seed(i))
        zeros = dict.fromkeys(checkpoint.MOMENTS, torch.zeros_like(values))
        checkpoint._put(trainer.engine, parameter, {"master": values, **zeros})


def lora(rank: Rank, name: str, *, from_zero: bool = False, **overrides: Any) -> dict[str, float]:
    """An adapter's first gradient, its factors, and the base before and after the update."""
    trainer = rank.trainer(train__lora=LORA, **overrides)
    if not from_zero:
        fill(trainer)
    factors = {name: tensor.clone() for name, tensor in full_weights.iter_trained(trainer.model)}
    before = base(trainer)
    metrics = rank.step(trainer).metrics
    assert all(torch.equal(tensor, before[key]) for key, tensor in base(trainer).items()), "the base is never changed"
    rank.write(f"lora_{name}", {key: tensor.float() for key, tensor in gradient(trainer).items()})
    rank.write(f"factors_{name}", factors)
    return metrics


def base(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What isn't trained, as it lies on this rank; publishing, which merges, comes between two looks at it."""
    for _ in trainer.iter_weights(20_000):
        pass
    shards = {name: getattr(p, "ds_tensor", p) for name, p in trainer.model.named_parameters() if not p.requires_grad}
    return {name: shard.detach().clone() for name, shard in shards.items()}


def lora_saved(rank: Rank) -> dict[str, Any]:
    """Under ZeRO-3: model and adapter after a step whose reference is the policy without its adapter, and that one's
    log-probs."""
    trainer = rank.trainer(model="untied", train__zero_stage=3, train__lora=LORA)
    fill(trainer)
    groups = [rollout_group(uid) for uid in ((0, 1, 2) if rank.rank == 0 else (3,))]
    report = trainer.train_step(groups=groups, scores=[scored(g) for g in groups], reference_logprobs=None, step=0)
    trainer.save_model(rank.folder / "lora" / "model")
    rows = trainer.reference_logprobs(scoring_samples(groups), temperature=0.7)
    rank.write("reference_lora", {str(i): torch.from_numpy(row) for i, row in enumerate(rows)})
    return report.metrics


def published_again(rank: Rank) -> list[dict[str, float]]:
    """A first step whose groups are of a version that holds its weights too, and one where it does not."""
    measured = []
    for versions in ([0, 9], None):
        trainer = rank.trainer()
        measured.append(trainer.train_step(**rank.part(trainer, FIRST, version=9), versions=versions).metrics)
    return measured


def resume(rank: Rank, name: str, **overrides: Any) -> dict[str, Any]:
    """A step, checkpoints, a second step; and the second step again from the checkpoint.

    One can't be written, one is written beside the second step.
    """
    trainer = rank.trainer(train__max_grad_norm=1.0, **overrides)
    rank.step(trainer)
    trainer.save_checkpoint("/dev/full/checkpoint")
    unwritten = asyncio.run(trainer.finish_checkpoint())
    trainer.save_checkpoint(rank.folder / f"checkpoint_{name}")
    trainer.save_checkpoint(rank.folder / f"beside_{name}", "always")
    went_on = rank.step(trainer, SECOND)
    assert asyncio.run(trainer.finish_checkpoint()) is None
    rank.write(f"went_on_{name}", weights(trainer))
    return {"went_on": went_on.metrics, "unwritten": unwritten, "resumed": resumed(rank, name, name, **overrides)}


def resumed(rank: Rank, name: str, saved: str, **overrides: Any) -> dict[str, Any]:
    trainer = rank.trainer(train__max_grad_norm=1.0, **overrides)
    trainer.load_checkpoint(rank.folder / f"checkpoint_{saved}")
    report = rank.step(trainer, SECOND)
    rank.write(f"resumed_{name}", weights(trainer))
    return report.metrics | {"step": report.step}


def saved_model(rank: Rank, model: str) -> dict[str, Any]:
    """Train a little under ZeRO 3, write the model and what its log-probs were; names and shapes beside it."""
    trainer = rank.trainer(model=model, train__zero_stage=3)
    rank.step(trainer)
    trainer.save_model(rank.folder / f"saved_{model}")
    groups = [rollout_group(uid) for uid in ((0, 1, 2) if rank.rank == 0 else (3,))]
    rows = trainer.logprobs(groups)
    rank.write(f"logprobs_{model}", {f"{g}.{i}": torch.from_numpy(row) for g, group in enumerate(rows)
                                     for i, row in enumerate(group)})
    described = [(name, str(dtype), list(shape)) for name, dtype, shape in trainer.weight_metadata()]
    given = [(name, str(w.dtype), list(w.shape)) for name, w in trainer.iter_weights(1)]
    return {"metadata": described, "given": given}


def several_updates(rank: Rank) -> dict[str, Any]:
    """Two epochs of two mini-batches with an adapted KL in the reward; rank 1 has one group, so one part is empty."""
    settings = {"algo__kl_coef": 0.05, "algo__kl_target": 0.001, "algo__kl_horizon": 100.0, "train__zero_stage": 2}
    trainer = rank.trainer(algo__epochs=2, algo__mini_batches=2, **settings)
    metrics = rank.step(trainer, split=5).metrics
    trainer.save_checkpoint(rank.folder / "checkpoint_adapted")
    again = rank.trainer(**settings)
    again.load_checkpoint(rank.folder / "checkpoint_adapted")
    return metrics | {"num_updates": trainer.engine.num_updates, "next_kl_coef": [trainer.kl_coef, again.kl_coef]}


def supervised_steps(rank: Rank) -> dict[str, Any]:
    trainer = rank.trainer(model="untied", train__zero_stage=1)
    mine = supervised(7, 5) if rank.rank == 0 else supervised(8, 3)
    return {"losses": [trainer.sft_step(mine).metrics["train/loss"] for _ in range(20)]}


def bfloat16(rank: Rank, stage: int) -> dict[str, Any]:
    trainer = rank.trainer(model__dtype="bfloat16", train__zero_stage=stage, train__learning_rate=1e-5)
    metrics = rank.step(trainer).metrics
    masters = {n: t for n, t in checkpoint._tensors(trainer.engine) if n.startswith("master.")}
    rank.write(f"bf16_{stage}", gradient(trainer))
    fine = sum(int((t != t.bfloat16().float()).sum()) for t in masters.values())  # moves that bf16 couldn't hold
    return {"metrics": metrics, "types": sorted({str(w.dtype) for w in weights(trainer).values()}), "fine": fine}


def two_ranks(rank: Rank) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = {
        f"zero_{s}": {"train__zero_stage": s, "batch__micro_batch_size": 3} for s in range(4)}
    stages["offloaded"] = {"train__zero_stage": 2, "train__deepspeed": {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}
    idle = {f"idle_{s}": {"train__zero_stage": s} for s in (0, 3)}
    in_parts = {f"{name}_streamed": {**KINDS[name], "train__zero_stage": 2} for name in STREAMED_KINDS} | {
        "streamed_packed": {"batch__micro_batch_size": None}}
    return {
        **gradients(rank, stages),
        **gradients(rank, idle, split=6),
        **streamed(rank, (0, 2, 3), in_parts),
        **gradients(rank, {"bf16_whole": {"model__dtype": "bfloat16", "batch__micro_batch_size": 1}}),
        **gradients(rank, {f"{name}_ranks": {**kind, "train__zero_stage": 2, "batch__micro_batch_size": 3}
                           for name, kind in KINDS.items()}),
        "zero_3_checkpointing": gradients(
            rank, {"zero_3_checkpointing": {"train__zero_stage": 3, "train__gradient_checkpointing": True}}),
        **of_stages(rank, (0, 3)),
        "resume_bf16": resume(rank, "bf16", model__dtype="bfloat16"),
        "lora_bf16": lora(rank, "bf16", model__dtype="bfloat16"),
        "lora_saved": lora_saved(rank),
        "saved": {model: saved_model(rank, model) for model in ("tied", "untied")},
        "several": several_updates(rank),
        "sft": supervised_steps(rank),
    }


def of_stages(rank: Rank, stages: tuple[int, ...]) -> dict[str, Any]:
    """What each ZeRO stage must do alike: resume, with an adapter too; an adapter's gradient; bf16."""
    return {
        "resume": {str(s): resume(rank, str(s), train__zero_stage=s) for s in stages},
        "resume_lora": {str(s): resume(rank, f"lora_{s}", train__zero_stage=s, train__lora=LORA | {"dropout": 0.2})
                        for s in stages},
        "lora": {str(s): lora(rank, str(s), train__zero_stage=s, batch__micro_batch_size=3) for s in stages},
        "bf16": {str(s): bfloat16(rank, s) for s in stages},
    }


def stages_between(rank: Rank) -> dict[str, Any]:
    """What repeats it on stages 1 and 2, which shard less than 3."""
    return {**of_stages(rank, (1, 2)), **streamed(rank, (1,), {})}


def one_rank(rank: Rank) -> dict[str, Any]:
    late = rank.trainer()
    rank.step(late, FIRST[::-1])
    rank.write("reversed", gradient(late))
    return gradients(rank, {
        "one": {}, "micro_1": {"batch__micro_batch_size": 1}, "micro_8": {"batch__micro_batch_size": 8},
        "block_diagonal": {"model__layout": "block_diagonal"}, "checkpointing": {"train__gradient_checkpointing": True},
        **KINDS,
    }) | {
        "resumed_elsewhere": resumed(rank, "elsewhere", "3"), "lora": lora(rank, "one"),
        "lora_first": lora(rank, "first", from_zero=True),
        "lora_checkpointing": lora(rank, "checkpointing", train__gradient_checkpointing=True),
        "published_again": published_again(rank),
    }


SCENARIOS: dict[str, Callable[[Rank], dict[str, Any]]] = {
    "one_rank": one_rank, "two_ranks": two_ranks, "stages_between": stages_between,
}
