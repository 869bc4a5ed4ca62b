"""Adapters: what they compute, what their merged weights are, what peft makes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from flux_ray.config import LoraConfig
from flux_ray.errors import UserError
from flux_ray.model import PackedModel, adapt, check_targets, load_policy, load_score, save_model, skeleton
from flux_ray.train import full_weights
from tests.families import make_family
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
IDS = torch.tensor([[5, 9, 3, 17, 4, 30, 8]])
TWO = LoraConfig(rank=4, alpha=6.0, targets=["q_proj", "mlp.down_proj"])


def gpt2(folder: Path) -> Path:
    """Its layers keep their weights as (in, out)."""
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


MAKERS = {"tied": lambda f: tiny_model(f, tied=True), "untied": lambda f: tiny_model(f, tied=False), "gpt2": gpt2,
          "mixture": lambda f: make_family("Qwen 3 MoE", f), "shared": lambda f: make_family("GLM-4 MoE", f)}
#: "shared" has experts that every token has beside the others, which are linear layers.
LORA = {"gpt2": LoraConfig(rank=4), "mixture": LoraConfig(rank=4, alpha=6.0, targets=["q_proj", "experts"]),
        "shared": LoraConfig(rank=4, alpha=6.0, targets=["experts.down_proj", "k_proj"])}


def opened(path: Path, dtype: torch.dtype = torch.float32) -> PackedModel:
    model = load_policy(path, dtype=dtype, chunk_tokens=8)
    model.eval()
    return model


def adapted(model: PackedModel, lora: LoraConfig, *, train_head: bool = False) -> PackedModel:
    """With factors that are not 0."""
    model.adapter = adapt(model.hf, lora, seed=0, train_head=train_head)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in full_weights.parameters(model):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def hidden(model: PackedModel) -> torch.Tensor:
    return model.hf.base_model(input_ids=IDS)[0]


def whole(model: PackedModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in full_weights.iter_weights(model, 20_000)}


@pytest.mark.parametrize("kind", MAKERS)
def test_merged_weights_are_the_model(tmp_path: Path, kind: str) -> None:
    """Under the checkpoint's names; the model's own are bitwise as they were; without the factors it is the base."""
    path = MAKERS[kind](tmp_path)
    lora = LORA.get(kind, TWO)
    base = opened(path)
    before, plain = whole(base), hidden(base).detach()
    described = full_weights.metadata(base)
    model = opened(path)
    model.adapter = adapt(model.hf, lora, seed=0, train_head=False)
    assert full_weights.metadata(model) == described
    assert all(torch.equal(weight, before[name]) for name, weight in whole(model).items()), "B is 0: nothing is changed"

    model = adapted(opened(path), lora)
    kept = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    merged, moved = whole(model), hidden(model).detach()
    assert list(merged) == list(before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.hf.state_dict().items())
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    of_hub = {part.name for name in model.adapter.factors() for part in model.parts.get(name, [])}
    assert changed == of_hub | (set(model.adapter.factors()) - set(model.parts))
    assert (moved - plain).abs().max() > 0.1
    save_model(tmp_path / "merged", merged, hf_config=base.original_config, tokenizer=None, generation_config=None)
    assert (hidden(opened(tmp_path / "merged")) - moved).abs().max() < 2e-5
    with model.adapter.off():
        assert torch.equal(hidden(model), plain)
    assert torch.equal(hidden(model), moved)


def test_bf16_is_merged_in_fp32(tmp_path: Path) -> None:
    model = adapted(opened(tiny_model(tmp_path, tied=True), torch.bfloat16), TWO)
    name, factors = next(iter(model.adapter.factors().items()))
    base = dict(model.hf.named_parameters())[name.replace(".weight", ".base_layer.weight")]
    wanted = base.double() + 1.5 * factors.b_OR.double() @ factors.a_RI.double()
    got = dict(full_weights.iter_weights(model, 20_000))[name]
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted.float().bfloat16())


def test_gradients_are_the_full_ones_projected(tmp_path: Path) -> None:
    """dL/dB = s·(dL/dW)·Aᵀ and dL/dA = s·Bᵀ·(dL/dW), W the merged weight; with B = 0 the latter is 0."""
    path = tiny_model(tmp_path, tied=True)
    for fill in (True, False):
        model = adapted(opened(path), TWO) if fill else opened(path)
        if not fill:
            model.adapter = adapt(model.hf, TWO, seed=0, train_head=False)
        full = opened(path)
        full.hf.load_state_dict(whole(model), strict=False)
        for one in (model, full):
            (hidden(one) * torch.linspace(-1, 1, 64).roll(11)).sum().backward()
        gradients = {name: p.grad.double() for name, p in full.hf.named_parameters()}
        for name, f in model.adapter.factors().items():
            wanted_b = f.scaling * gradients[name] @ f.a_RI.double().T
            wanted_a = f.scaling * f.b_OR.double().T @ gradients[name]
            assert (f.b_OR.grad - wanted_b).norm() <= 1e-5 * wanted_b.norm() > 0
            assert (f.a_RI.grad - wanted_a).norm() <= 1e-5 * wanted_a.norm()
            assert fill or not f.a_RI.grad.any()
        assert {p.grad is None for n, p in model.hf.named_parameters() if "lora_" not in n} == {True}


def test_gradients_of_experts_are_the_full_ones_projected(tmp_path: Path) -> None:
    """Of each expert as of a matrix, in peft's order of their factors."""
    path = make_family("Mixtral", tmp_path / "base")
    model = adapted(opened(path), LoraConfig(rank=3, alpha=6.0, targets=["experts"]))
    merged = whole(model)
    save_model(tmp_path / "full", merged, hf_config=model.original_config, tokenizer=None, generation_config=None)
    full = opened(tmp_path / "full")
    for one in (model, full):
        (hidden(one) * torch.linspace(-1, 1, 64).roll(11)).sum().backward()
    gradients = {name: p.grad.double() for name, p in full.hf.named_parameters() if p.grad is not None}
    for name, f in model.adapter.factors().items():
        b_grad, a_grad = f.b_OR.grad.view(len(f.b_OR), 3, 4), f.a_RI.grad.view(4, 3, -1)
        for i, gradient in enumerate(gradients[name]):
            of = f.of_expert(i)
            wanted_b, wanted_a = 2 * gradient @ of.a_RI.double().T, 2 * of.b_OR.double().T @ gradient
            assert (b_grad[..., i] - wanted_b).norm() <= 1e-4 * wanted_b.norm()
            assert (a_grad[i] - wanted_a).norm() <= 1e-4 * wanted_a.norm()
    assert len(model.adapter.factors()) == 4, "two tensors in each of two layers"


@pytest.mark.parametrize("kind", MAKERS)
def test_peft_opens_the_folder(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "base")
    lora = LORA[kind] if kind in ("mixture", "shared") else LoraConfig(rank=3, alpha=5.0)
    model = adapted(opened(path), lora)
    folder = tmp_path / "adapter"
    model.adapter.save(folder, full_weights.iter_trained(model), base=str(path), task="CAUSAL_LM")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = peft.PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == str(path)
    assert max(map(len, config.target_modules)) < 10, "endings, not a list of all layers"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder).eval()
    head = model.hf.get_output_embeddings()
    ours = torch.nn.functional.linear(hidden(model), head.weight)
    assert (theirs(input_ids=IDS).logits - ours).abs().max() < 1e-5


def test_a_score_models_head_is_trained_wholly_and_saved(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "base", tied=True)
    model = adapted(load_score(path, dtype=torch.float32), TWO, train_head=True)
    trained = [name for name, _ in full_weights.parameters(model)]
    assert "score.weight" in trained and all("lora_" in name or name == "score.weight" for name in trained)
    model.adapter.save(tmp_path / "adapter", full_weights.iter_trained(model), base=str(path), task="SEQ_CLS")
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    hf = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    ours = torch.nn.functional.linear(hidden(model), model.hf.score.weight)[0, -1]
    assert (theirs(input_ids=IDS).logits - ours).abs().max() < 1e-5


@pytest.mark.parametrize(("targets", "said"), [
    (["q_proj", "qproj"], "'qproj': did you mean 'q_proj'? (known: all-linear, down_proj, gate_proj, k_proj, o_proj"),
    (["lm_head"], "train.lora.targets: 'lm_head' is lm_head (the model's head): linear layers other than the head"),
    (["embed_tokens"], "'embed_tokens' is model.embed_tokens (Embedding): linear"),
    (["self_attn"], "'self_attn' is model.layers.0.self_attn (Qwen3Attention)"),
    ("proj", "unknown layer in train.lora.targets 'proj'"),
])
@pytest.mark.parametrize("tied", [True, False])
def test_targets_that_are_none(tmp_path: Path, targets: Any, said: str, tied: bool) -> None:
    with pytest.raises(UserError) as error:
        check_targets(skeleton(tiny_model(tmp_path, tied=tied)), LoraConfig(rank=2, targets=targets))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), ("v_proj", 2), (["0.mlp.up_proj", "k_proj"], 3)])
def test_targets_by_endings(tmp_path: Path, targets: Any, count: int) -> None:
    hf = skeleton(tiny_model(tmp_path, tied=True))
    assert {p.device.type for p in hf.parameters()} == {"meta"}
    check_targets(hf, LoraConfig(rank=2, targets=targets))
    model = opened(tmp_path)
    assert len(adapt(model.hf, LoraConfig(rank=2, targets=targets), seed=0, train_head=False).factors()) == count


@pytest.mark.parametrize(("lora", "said"), [
    (LoraConfig(rank=2, targets=["gate"]), "'gate' is model.layers.0.mlp.gate (Qwen3MoeTopKRouter): linear layers "
     "other than the head can be adapted, and experts (experts.down_proj, experts.gate_up_proj, k_proj"),
    (LoraConfig(rank=2, targets=["expert"]), "unknown layer in train.lora.targets 'expert'"),
    (LoraConfig(rank=2, targets=["experts"], dropout=0.1), "train.lora.dropout=0.1 with experts in train.lora.targets"),
])
def test_targets_of_a_mixture_that_are_none(tmp_path: Path, lora: LoraConfig, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_targets(skeleton(make_family("Qwen 3 MoE", tmp_path)), lora)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("targets", "count"), [
    ("all-linear", 8), ("experts", 4), (["down_proj"], 2), (["0.mlp.experts.gate_up_proj", "k_proj"], 3)])
def test_targets_of_a_mixture_by_endings(tmp_path: Path, targets: Any, count: int) -> None:
    model = opened(make_family("Qwen 3 MoE", tmp_path))
    assert len(adapt(model.hf, LoraConfig(rank=2, targets=targets), seed=0, train_head=False).factors()) == count
