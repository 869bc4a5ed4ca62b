"""What ranks do with a mixture of experts.

Takes:  a Rank, on each of two processes; its folder has a model `mixture`.
Gives:  the scenario `mixture`: weights by the hub's names, whole, of ZeRO 0 and 3 after two steps; what is frozen.
        `mixture_between`: of ZeRO 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.train.scenarios import FIRST, SECOND, Rank, weights

MODEL = "mixture"
BALANCE = {"train__router_balance_coef": 0.5}
OF_EXPERTS = {"rank": 2, "alpha": 6.0, "targets": ["experts", "q_proj"]}


def trained(rank: Rank, name: str, **overrides: Any) -> dict[str, float]:
    """Two steps; their weights go to the folder under `name`. Gives the second's metrics."""
    trainer = rank.trainer(model=MODEL, **overrides)
    rank.step(trainer, FIRST)
    report = rank.step(trainer, SECOND)
    rank.write(name, weights(trainer))
    return report.metrics


def under(rank: Rank, *stages: int) -> dict[str, dict[str, float]]:
    """Trained under these ZeRO stages, and with adapters on experts. Gives the metrics of the first."""
    metrics = {}
    for stage in stages:
        metrics[str(stage)] = trained(rank, f"mixture_{stage}", train__zero_stage=stage, **BALANCE)
        trained(rank, f"mixture_lora_{stage}", train__zero_stage=stage, train__lora=OF_EXPERTS)
    return metrics


def mixture(rank: Rank) -> dict[str, Any]:
    untouched = weights(rank.trainer(model=MODEL, train__zero_stage=3))
    rank.write("mixture_untouched", untouched)
    adapter = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "o_proj"]}
    metrics = under(rank, 0, 3)
    trained(rank, "mixture_free", train__zero_stage=0)
    trained(rank, "mixture_frozen", train__zero_stage=2, train__freeze_routers=True)
    trained(rank, "mixture_lora", train__zero_stage=3, train__lora=adapter)
    saver = rank.trainer(model=MODEL, train__zero_stage=3)
    rank.step(saver, FIRST)
    saver.save_checkpoint(rank.folder / "mixture_checkpoint")
    saver.save_model(rank.folder / "mixture_saved")
    wanted = weights(saver)
    resumed = rank.trainer(model=MODEL, train__zero_stage=1)
    resumed.load_checkpoint(rank.folder / "mixture_checkpoint")
    same = all(torch.equal(tensor, wanted[name]) for name, tensor in weights(resumed).items())
    rank.write("mixture_wanted", wanted)
    return {"metrics": metrics, "resumed": same}


def between(rank: Rank) -> dict[str, Any]:
    return {"metrics": under(rank, 1, 2)}


SCENARIOS: dict[str, Callable[[Rank], dict[str, Any]]] = {"mixture": mixture, "mixture_between": between}
