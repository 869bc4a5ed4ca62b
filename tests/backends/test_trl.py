"""TRL itself, where it is installed: its losses of our batch, and a short training through it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_ray import FluxConfig, algo
from flux_ray.algo.estimators import EPS_STD
from flux_ray.backends import trl as backend
from flux_ray.backends.trl_settings import check_trl
from flux_ray.batch import StepCounts, divisor, loss_weights
from flux_ray.data import PromptSource
from flux_ray.model import load_tokenizer
from flux_ray.observability.callbacks import as_callback
from flux_ray.observability.run_folder import METRICS, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.run.recorder import Recorder
from tests.tiny import tiny_model

pytest.importorskip("trl", reason="trl isn't installed: pip install 'flux-ray[trl]'")
pytestmark = pytest.mark.system

ROWS, PROMPT, LENGTH = 6, 4, 7
ENDS = (7, 1, 4, 6, 2, 5)   # loss tokens of each row
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "gold": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config_of(model, data, algorithm, folder, **options):
    given = {"data.answer_column": "gold", "max_tokens": MAX_TOKENS, "prompts_per_step": 2, "num_steps": 2,
             "warmup_steps": 0, "learning_rate": 1e-3, "run_dir": str(folder), "cluster.device": "cpu", **options}
    config, _ = check_trl(FluxConfig(model_path=str(model), data={"train": str(data)}, algorithm=algorithm, **given))
    return config


def trainer_of(config, folder):
    run = RunFolder(folder)
    run.create(config, resume_step=None)
    prompts = PromptSource.from_config(config, load_tokenizer(config.model.path), context_length=64)
    recorder = Recorder(config, folder=run, terminal=Terminal(io.StringIO(), enabled=False))
    return backend.make_trainer(config, prompts, recorder=recorder)


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Ragged rows of random tokens; old and reference log-probs near the model's own; advantages of both signs."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (ROWS, PROMPT + LENGTH), generator=rng)
    mask = torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]
    near = torch.randn(2, ROWS, LENGTH, generator=rng)
    return {"ids": ids, "mask": mask, "near": near, "advantages": torch.randn(ROWS, generator=rng)}


def log_probs(hf, batch, temperature: float = 1.0):
    attention = torch.cat([torch.ones(ROWS, PROMPT), batch["mask"]], 1).long()
    logits = hf(input_ids=batch["ids"], attention_mask=attention).logits[:, PROMPT - 1:-1].float() / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, batch["ids"][:, PROMPT:, None])[..., 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {"beta": 0.04, "entropy_coef": 0.0}),
    ("grpo", {"beta": 0.0, "entropy_coef": 0.0, "dual_clip": 1.2}),
    ("dr_grpo", {}), ("dapo", {"entropy_coef": 0.02}), ("gspo", {"clip_range": 0.05, "clip_range_high": 0.06}),
    ("cispo", {"clip_range_high": 0.1}), ("rloo", {}),
])
def test_the_loss_and_gradient_of_one_batch(model, data, tmp_path, algorithm, options):
    """Several updates old: every ratio is far from 1. Values and gradients of the weights to 1e-6."""
    config = config_of(model, data, algorithm, tmp_path, **options)
    trainer = trainer_of(config, tmp_path)
    hf = trainer.model.train()
    batch = batch_of()
    mask = batch["mask"]
    with torch.no_grad():
        current, _ = log_probs(hf, batch)
    old, reference = current + 0.15 * batch["near"][0], current + 0.3 * batch["near"][1]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    inputs = {
        "prompt_ids": batch["ids"][:, :PROMPT], "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": batch["ids"][:, PROMPT:], "completion_mask": mask.long(), "advantages": batch["advantages"],
        "old_per_token_logps": old, "ref_per_token_logps": reference, "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(hf, inputs)
    gradients = torch.autograd.grad(theirs, list(hf.parameters()))

    resolved = algo.resolve(config.algo)
    counts = StepCounts(num_sequences=ROWS, num_tokens=int(mask.sum()))
    weights = np.stack([loss_weights(resolved.aggregation, loss_mask=row, max_tokens=MAX_TOKENS)
                        for row in mask.numpy()]) / np.float32(divisor(resolved.aggregation, counts))
    chosen, entropy = log_probs(hf, batch)
    ours, _ = algo.policy_objective(
        resolved, config.algo, log_prob=chosen, old_log_prob=old, sampler_log_prob=None,
        reference_log_prob=reference if config.algo.beta else None, entropy=entropy,
        advantages=batch["advantages"][:, None].expand(ROWS, LENGTH), response_mask=mask,
        loss_weights=torch.from_numpy(weights))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, list(hf.parameters())), gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_their_advantages_are_ours_but_for_the_constant(algorithm):
    """(R - mean) / (std + 1e-4) there, + 1e-6 here: ours x (std + 1e-6) / (std + 1e-4)."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [3.0, 3.0, 3.0, 3.0]])
    std = rewards.std(1, keepdim=True)
    theirs = rewards - rewards.mean(1, keepdim=True)
    theirs = theirs / (std + 1e-4) if algorithm == "grpo" else theirs
    mask = torch.ones(8, 1, dtype=torch.bool)
    ours, _ = algo.get_adv_estimator(algorithm)(rewards.view(8, 1), mask, index=torch.arange(8) // 4)
    factor = (std + EPS_STD) / (std + 1e-4) if algorithm == "grpo" else torch.ones(2, 1)
    torch.testing.assert_close(ours.view(2, 4) * factor, theirs, rtol=1e-6, atol=1e-7)


def test_a_step_takes_more_prompts_than_there_are(model, data, tmp_path):
    """As ours: the next epoch's follow. By itself TRL would train on nothing, and say nothing."""
    config = config_of(model, data, "grpo", tmp_path / "run", prompts_per_step=8)
    assert len(backend.train(config).history) == 2


def test_bf16_keeps_fp32_weights_while_it_trains(model, data, tmp_path):
    """In bf16 an update would be less than the last bit of most weights. What is saved is bf16 again."""
    from safetensors.torch import load_file

    config = config_of(model, data, "grpo", tmp_path, **{"model.dtype": "bfloat16"})
    trainer = trainer_of(config, tmp_path)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and trainer.args.bf16
    result = backend.train(config_of(model, data, "grpo", tmp_path / "run", **{"model.dtype": "bfloat16"}))
    assert {t.dtype for t in load_file(result.model_path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", *(pytest.param(name, marks=pytest.mark.all)
                                                         for name in ("dr_grpo", "dapo", "gspo", "cispo"))])
def test_a_short_training(model, data, tmp_path, algorithm):
    config = config_of(model, data, algorithm, tmp_path / "run", **{"reward.functions": ["numeric", "length"]})
    seen: list[int] = []
    result = backend.train(config, callbacks=[as_callback(lambda step, metrics: seen.append(step))])
    lines = read_lines(tmp_path / "run" / METRICS)
    assert seen == [0, 1] and [line["step"] for line in lines] == seen
    assert all({"reward/mean", "actor/entropy", "rollout/response_length_mean"} <= set(line) for line in lines)
    assert result.num_steps == 2 and result.metrics["reward/mean"] == lines[-1]["reward/mean"]
    from safetensors.torch import load_file

    before, after = load_file(model / "model.safetensors"), load_file(result.model_path / "model.safetensors")
    assert set(before) <= set(after) | {"lm_head.weight"}
    assert load_tokenizer(str(result.model_path))("1+").input_ids == load_tokenizer(str(model))("1+").input_ids
