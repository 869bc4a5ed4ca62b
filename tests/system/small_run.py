"""A small run whose weights move far in a few steps, and what every such run must show.

Gives:  `options` of it; `assert_agreement` of engines and trainer after every update; `assert_moved`; its length;
        `assert_same`, of a run that was disturbed and one that was not; `assert_same_weights`.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from flux_ray.audit import audit
from tests.system.program import metrics

MAX_GAP = 2e-5  # nats, float32: log-probs of up to -10 agree to some float32 ulps
NUM_STEPS = 12


def options(toys, model: Path) -> dict:
    return {
        "model.path": str(model), "rollout.num_engines": 1, "rollout.max_tokens": 16, "train.num_ranks": 2,
        "batch.prompts_per_step": 8, "algo.beta": 0.0, "train.learning_rate": 3e-3, "train.warmup_steps": 0,
        "reward.functions": [f"{toys.rewards}:digits"], "driver.num_steps": NUM_STEPS,
        "observability.samples_per_step": 2,
    }


def assert_agreement(run_dir: Path, model: Path, num_steps: int = NUM_STEPS) -> None:
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(num_steps))
    assert_moved(model, load_file(run_dir / "model" / "model.safetensors"))
    gaps = [line["weights/logprob_gap_max"] for line in lines]
    assert max(gaps) <= MAX_GAP, gaps


def assert_moved(model: Path, after: dict[str, Tensor]) -> None:
    before = load_file(model / "model.safetensors")
    moved = math.sqrt(sum(float((after[name] - w).square().sum()) for name, w in before.items()))
    size = math.sqrt(sum(float(w.square().sum()) for w in before.values()))
    assert moved > 0.05 * size, f"the weights moved by {moved:.3g} of {size:.3g}: agreement says nothing"


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert audit(run_dir).is_clean
    assert_same_weights(run_dir / "model", undisturbed / "model")


def assert_same_weights(model: Path, other: Path) -> None:
    stored, wanted = (load_file(folder / "model.safetensors") for folder in (model, other))
    assert stored.keys() == wanted.keys()
    assert [name for name in stored if not stored[name].equal(wanted[name])] == []
