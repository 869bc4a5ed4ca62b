"""Steps on preference pairs, on one rank and on two.

Takes:  a Rank; a folder with models in `tied/` and `untied/`.
Gives:  as tests.train.scenarios.
"""

from __future__ import annotations

from typing import Any

from flux_ray.records import PreferencePair, StepReport
from flux_ray.train import Trainer
from tests.train.batches import pairs
from tests.train.scenarios import LORA, Rank, fill, gradient, weights

FIRST, SECOND = pairs(1, 8), pairs(2, 8)
SPLIT = 5  # pairs of rank 0, where there are two
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"algo__name": "dpo"}, "ipo": {"algo__name": "ipo", "algo__pair_logprobs": "mean"},
    "reward_model": {"algo__name": "reward_model"},
}
#: What shards and recomputes most at once.
SHARDED = {"train__zero_stage": 3, "train__gradient_checkpointing": True, "batch__micro_batch_size": 3}
ADAPTED = ("dpo", "reward_model")
LAST = {"train__learning_rate": 1e-2, "algo__name": "reward_model"}


def share(rank: Rank, batch: list[PreferencePair], trainer: Trainer) -> dict[str, Any]:
    """This rank's pairs, and made log-probs of a reference."""
    places = range(len(batch))
    if rank.world_size == 2:
        places = places[:SPLIT] if rank.rank == 0 else places[SPLIT:]
    reference = [(-3.0 - i, -4.0 + i) for i in places] if trainer.config.algo.name != "reward_model" else None
    return {"pairs": [batch[i] for i in places], "reference_logprobs": reference}


def step(rank: Rank, trainer: Trainer, batch: list[PreferencePair]) -> StepReport:
    return trainer.pair_step(**share(rank, batch, trainer))


def gradients(rank: Rank, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First gradients, and what was measured before and in the step."""
    result = {}
    for name, overrides in variants.items():
        trainer = rank.trainer(**overrides)
        before = trainer.pair_metrics(**share(rank, FIRST, trainer))
        measured = step(rank, trainer, FIRST).metrics
        result[name] = {"before": before, "step": measured}
        rank.write(f"pairs_{name}", gradient(trainer))
    return result


def resume(rank: Rank, name: str, **overrides: Any) -> dict[str, Any]:
    """A step, a checkpoint, a second step; and the second step again from the checkpoint."""
    trainer = rank.trainer(**overrides)
    step(rank, trainer, FIRST)
    trainer.save_checkpoint(rank.folder / f"checkpoint_pairs_{name}")
    went_on = step(rank, trainer, SECOND).metrics
    rank.write(f"pairs_went_on_{name}", weights(trainer))
    again = rank.trainer(**overrides)
    again.load_checkpoint(rank.folder / f"checkpoint_pairs_{name}")
    resumed = step(rank, again, SECOND).metrics
    rank.write(f"pairs_resumed_{name}", weights(again))
    return {"went_on": went_on, "resumed": resumed}


def saved_reward_model(rank: Rank) -> dict[str, Any]:
    """Train until the scores differ, write the model; its mean scores, and again from the written model."""
    trainer = rank.trainer(**LAST, train__zero_stage=3)
    losses = [step(rank, trainer, FIRST).metrics["train/loss"] for _ in range(10)]
    trainer.save_model(rank.folder / "reward_model")
    measured = trainer.pair_metrics(**share(rank, FIRST, trainer))
    again = rank.trainer(model="reward_model", **LAST)
    return {"losses": losses, "measured": measured, "again": again.pair_metrics(**share(rank, FIRST, again))}


def adapted(rank: Rank, suffix: str, **overrides: Any) -> dict[str, Any]:
    """First gradients of an adapter that isn't 0: of its factors, and of a reward model's head."""
    measured = {}
    for name in ADAPTED:
        trainer = rank.trainer(**OBJECTIVES[name], train__lora=LORA, **overrides)
        fill(trainer)
        measured[f"{name}_lora{suffix}"] = step(rank, trainer, FIRST).metrics
        rank.write(f"pairs_{name}_lora{suffix}", gradient(trainer))
    return measured


def without_adapter(rank: Rank) -> list[list[tuple[float, float]]]:
    """What the ranks that are their own reference say of pairs: before a step, and after it."""
    trainer = rank.trainer(**OBJECTIVES["dpo"], train__lora={"rank": 4})
    mine = share(rank, FIRST, trainer)["pairs"]
    before = trainer.pair_reference(mine)
    step(rank, trainer, FIRST)
    return [before, trainer.pair_reference(mine)]


def two_ranks(rank: Rank) -> dict[str, Any]:
    stages = {"dpo": (0, 2, 3), "ipo": (1,), "reward_model": (0, 3)}
    variants = {f"{name}_zero_{stage}": {**OBJECTIVES[name], "train__zero_stage": stage, "batch__micro_batch_size": 3}
                for name, of_one in stages.items() for stage in of_one}
    result = gradients(rank, variants)
    result["resume"] = {name: resume(rank, name, **OBJECTIVES[name]) for name in ("dpo", "reward_model")}
    return result | {"saved": saved_reward_model(rank), "adapted": adapted(rank, "_sharded", **SHARDED)}


def one_rank(rank: Rank) -> dict[str, Any]:
    small = {"batch__micro_batch_size": 1}, {"batch__micro_batch_size": 16}, {"model__layout": "block_diagonal"}
    variants = {f"{name}_one_{i}": {**objective, **more}
                for name, objective in OBJECTIVES.items() for i, more in enumerate(small)}
    return gradients(rank, {**OBJECTIVES, **variants}) | {
        "without_adapter": without_adapter(rank), "adapted": adapted(rank, "")}


SCENARIOS = {"pairs_two": two_ranks, "pairs_one": one_rank}
