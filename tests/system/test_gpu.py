"""The whole loop on one GPU, shared by engine, trainer and reference. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from flux_ray import FluxConfig, FluxTrainer
from tests.system.program import metrics

pytestmark = [pytest.mark.system, pytest.mark.timeout(400),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_STEPS = 4
MAX_GAP = 0.25  # nats of a single token in bf16: random weights, log-probs of up to -10


@pytest.mark.parametrize(("backend", "staleness"), [("ipc", 0), ("ipc", 1), ("gloo", 0)])
def test_engine_and_trainer_share_a_gpu(toys, tmp_path, backend: str, staleness: int) -> None:
    config = FluxConfig(algorithm="grpo", run_dir=str(tmp_path / "run"), **{
        "model.path": str(toys.tied), "cluster.device": "cuda", "cluster.colocate": True, "weights.backend": backend,
        "rollout.max_tokens": 16, "rollout.engine_args": {"enforce_eager": True}, "batch.prompts_per_step": 8,
        "algo.beta": 0.01, "train.learning_rate": 3e-3, "train.warmup_steps": 0, "driver.max_staleness": staleness,
        "reward.functions": [f"{toys.rewards}:digits"], "driver.num_steps": NUM_STEPS})
    result = FluxTrainer(config).fit(prompts=str(toys.data))
    lines = metrics(tmp_path / "run")
    assert result.num_steps == NUM_STEPS and [line["driver/version"] for line in lines] == [1, 2, 3, 4]
    gaps = [line["weights/logprob_gap_max"] for line in lines]
    assert 0 < max(gaps) < MAX_GAP, gaps
    assert all(line["train/grad_norm"] > 0 for line in lines)
