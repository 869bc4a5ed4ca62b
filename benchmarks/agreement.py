"""How far the engines' log-probs are from the trainer's, update after update, in the whole system.

    python -m benchmarks.agreement

Five runs of 50 updates on two engines and two ranks: tied and untied embeddings at temperatures 1 and 0.7 in float32,
and one in bfloat16. One JSON line each: the largest gap and the mean over loss tokens (nats), over all updates, and how
far the weights moved (relative).
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from flux_ray import FluxConfig, FluxTrainer
from tests.tiny import tiny_model

NUM_UPDATES = 50
REWARD = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / 16 for text in completions]
"""


def run(folder: Path, *, tied: bool, temperature: float, dtype: str) -> dict[str, float | str | bool]:
    model = tiny_model(folder / "model", tied=tied, context=64)
    (folder / "reward.py").write_text(REWARD)
    config = FluxConfig(
        model={"path": str(model), "dtype": dtype}, run_dir=str(folder / "run"), num_steps=NUM_UPDATES,
        rollout={"num_engines": 2, "max_tokens": 16, "temperature": temperature},
        train={"num_ranks": 2, "learning_rate": 1e-3, "warmup_steps": 0}, batch={"prompts_per_step": 8},
        algo={"beta": 0.0, "entropy_coef": 0.05}, reward={"functions": [f"{folder / 'reward.py'}:digits"]},
        observability={"progress": False},
    )
    result = FluxTrainer(config).fit(prompts=[f"{i}+{i + 1}=" for i in range(40)])
    before, after = load_file(model / "model.safetensors"), load_file(result.model_path / "model.safetensors")
    moved = sum(float((after[name].float() - w.float()).square().sum()) for name, w in before.items())
    size = sum(float(w.float().square().sum()) for w in before.values())
    return {
        "tied": tied, "temperature": temperature, "dtype": dtype, "updates": len(result.history),
        "gap_max": max(line["weights/logprob_gap_max"] for line in result.history),
        "gap_mean": sum(line["weights/logprob_gap_mean"] for line in result.history) / len(result.history),
        "weights_moved": math.sqrt(moved / size),
        "reward_first": result.history[0]["reward/mean"], "reward_last": result.history[-1]["reward/mean"],
    }


def main() -> None:
    torch.set_num_threads(1)
    cases = [(tied, temperature, "float32") for tied in (True, False) for temperature in (1.0, 0.7)]
    for tied, temperature, dtype in [*cases, (True, 1.0, "bfloat16")]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(Path(folder), tied=tied, temperature=temperature, dtype=dtype)), flush=True)


if __name__ == "__main__":
    main()
