"""TRL's own losses of pairs and completions on the batch that our engine packs; a short training through it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_ray import FluxConfig
from flux_ray.backends import trl as backend
from flux_ray.backends.trl_pairs import make_pair_trainer
from flux_ray.backends.trl_settings import check_trl
from flux_ray.batch import pack, pair_samples
from flux_ray.config import Config
from flux_ray.data import PairSource
from flux_ray.model import last_token, load_policy, load_score, load_tokenizer, norm
from flux_ray.model.scoring import per_sample, response_sums
from flux_ray.observability.run_folder import METRICS, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.run.recorder import Recorder
from flux_ray.train.pair_step import PairObjective
from tests.tiny import tiny_model

trl = pytest.importorskip("trl", reason="trl isn't installed: pip install 'flux-ray[trl]'")
pytestmark = pytest.mark.system

# What is compared is losses: both models have the same attention and (norm.put_in_place on TRL's) the same norms.
LOADING: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "layout": "padded"}
OF_POLICY = {"temperature": 1.0, "with_entropy": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_model(folder / "policy", tied=True, seed=0)
    tiny_model(folder / "reference", tied=True, seed=1)
    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(7 * i + 1) * (1 + i % 3), "margin": 0.3 * i}
            for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: Path, algorithm: str, run_dir: Path, **options: Any) -> Config:
    reference = {} if algorithm == "reward_model" else {"reference.path": str(folder / "reference")}
    given = {**reference, "prompts_per_step": 6, "num_steps": 2, "warmup_steps": 0,
             "learning_rate": 1e-3, "run_dir": str(run_dir), "cluster.device": "cpu", **options}
    return FluxConfig(model_path=str(folder / "policy"), data={"train": str(folder / "pairs.jsonl")},
                      algorithm=algorithm, **given)


def source(config: Config) -> PairSource:
    return PairSource.from_config(config, load_tokenizer(str(config.model.path)), context_length=64)


def ours(model: Any, config: Config, pairs: PairSource, *, reference: Any = None) -> tuple[float, dict[str, Any]]:
    """Loss and gradients (by transformers' names) over several micro-batches, as a step makes them."""
    scored_at = None if reference else lambda ids: last_token(ids, model.original_config.pad_token_id)
    samples = pair_samples(pairs.all(), scored_at=scored_at)
    micro_batches = pack(samples, max_tokens=40, padded=True, unit=2)
    assert len(micro_batches) > 1
    sums = None
    if reference is not None:
        with torch.no_grad():
            values = [reference(m, **OF_POLICY)[0] for m in micro_batches]
        sums = torch.tensor(response_sums(per_sample(values, micro_batches, len(samples))))
    margins = torch.tensor([pair.margin for pair in pairs.all()]).repeat_interleave(2)
    objective = PairObjective(config.algo, sums, margins, num_pairs=pairs.num_rows)
    total = 0.0
    for i, micro_batch in enumerate(micro_batches):
        given = model(micro_batch, **OF_POLICY)[0] if reference else model(micro_batch, at="last")
        loss, _ = objective(i, micro_batch, given)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.hf.named_parameters() if p.grad is not None}


def assert_same(mine: tuple[float, dict[str, Any]], loss: torch.Tensor, hf: torch.nn.Module) -> None:
    named = [(name, p) for name, p in hf.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    assert mine[0] == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    for (name, _), gradient in zip(named, gradients, strict=True):
        # A sum in fp32 is as exact as its largest terms, and processors add in different orders.
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mine[1][name], gradient, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("algorithm", ["dpo", "ipo"])
def test_pairs(folder, tmp_path, algorithm):
    config, _ = check_trl(config_of(folder, algorithm, tmp_path))
    pairs = source(config)
    recorder = Recorder(config, folder=RunFolder(tmp_path), terminal=Terminal(io.StringIO(), enabled=False))
    trainer = make_pair_trainer(config, pairs, recorder=recorder, model=str(folder / "policy"), device="cpu")
    norm.put_in_place(trainer.model)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    theirs = trainer._compute_loss(trainer.model.train(), inputs, False)
    policy, reference = (load_policy(folder / name, chunk_tokens=16, **LOADING) for name in ("policy", "reference"))
    assert_same(ours(policy, config, pairs, reference=reference), theirs, trainer.model)


def test_scores(folder, tmp_path):
    """A head of its own: a new one is all zeros, and every loss log 2."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    config = config_of(folder, "reward_model", tmp_path)
    pairs = source(config)
    model = load_score(folder / "policy", **LOADING)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, pad_token_id=0)
    theirs.load_state_dict(model.hf.state_dict())
    rows = [{"chosen_ids": p.chosen_ids.tolist(), "rejected_ids": p.rejected_ids.tolist(), "margin": p.margin}
            for p in pairs.all()]
    arguments = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")

    class OnOurTokens(trl.RewardTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    trainer = OnOurTokens(model=theirs, args=arguments, train_dataset=Dataset.from_list(rows),
                          processing_class=load_tokenizer(folder / "policy"))
    norm.put_in_place(trainer.model)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    assert_same(ours(model, config, pairs), loss, trainer.model)


def test_completions(folder, tmp_path):
    from datasets import Dataset

    policy = load_policy(folder / "policy", chunk_tokens=16, **LOADING)
    samples = pair_samples(source(config_of(folder, "dpo", tmp_path)).all())
    num_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    total = 0.0
    for micro_batch in pack(samples, max_tokens=40, padded=True):
        loss = -policy(micro_batch, **OF_POLICY)[0].sum() / num_tokens
        loss.backward()
        total += loss.item()
    rows = [{"input_ids": s.token_ids.tolist(), "completion_mask": s.loss_mask.astype(int).tolist()} for s in samples]
    arguments = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                              completion_only_loss=True, model_init_kwargs={"dtype": "float32"})
    trainer = trl.SFTTrainer(model=str(folder / "policy"), args=arguments, train_dataset=Dataset.from_list(rows),
                             processing_class=load_tokenizer(folder / "policy"))
    norm.put_in_place(trainer.model)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    theirs = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=torch.tensor(num_tokens))
    assert_same((total, {name: p.grad for name, p in policy.hf.named_parameters()}), theirs, trainer.model)


def test_a_short_training_of_pairs(folder, tmp_path):
    config = config_of(folder, "dpo", tmp_path / "run", **{"reference.path": None})
    result = backend.train(config)
    lines = read_lines(tmp_path / "run" / METRICS)
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3) and lines[1]["train/loss"] < lines[0]["train/loss"]
    assert lines[1]["pairs/margin"] > 0 and (result.model_path / "config.json").is_file()
