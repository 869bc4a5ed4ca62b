"""Sequences in one row, apart by their borders: the same log-probs and gradients as in rows of their own.

The kernels need a GPU; elsewhere the formula stands in for them, as where a model is tried at its loading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Llama4TextConfig,
    MiniCPM3Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    StableLmConfig,
)

from flux_ray.batch import MicroBatch, make_micro_batch
from flux_ray.errors import UserError
from flux_ray.model import load, load_policy, varlen
from flux_ray.model.load import resolve_layout
from flux_ray.model.traits import traits_of
from flux_ray.records import Sample

pytestmark = pytest.mark.unit
on_gpu = pytest.mark.skipif(varlen.why_not(torch.bfloat16) is not None, reason="needs a GPU from Ampere on")
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
             bos_token_id=None, initializer_range=0.15)
MODELS = [Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=16)]
LENGTHS = (140, 3, 57, 200)


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def ragged() -> MicroBatch:
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 64, n).astype(np.int32), np.arange(n) >= 2, (np.arange(n) >= 2) / n)
               for n in LENGTHS]
    return make_micro_batch(samples, sample_ids=range(len(samples)))


def results(folder: Path, layout: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Log-probs, and the gradients of their sum."""
    policy = load_policy(folder, dtype=dtype, layout=layout, chunk_tokens=64).to(device)
    assert policy.layout == layout
    logprobs_S, _ = policy(ragged().to(device), temperature=1.0, with_entropy=False)
    logprobs_S.sum().backward()
    return [t.detach().double().cpu() for t in (logprobs_S, *(p.grad for p in policy.parameters()))]


def off_by(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative errors: the norm of the difference by that of what was wanted; the largest."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_borders_window_and_scale_are_those_of_padded_rows(tmp_path, monkeypatch, config: PreTrainedConfig) -> None:
    saved(config, tmp_path)
    wanted = results(tmp_path, "padded", torch.float32, "cpu")
    monkeypatch.setattr(varlen, "why_not", lambda dtype: None)
    assert off_by(results(tmp_path, "varlen", torch.float32, "cpu"), wanted) < 1e-5


@on_gpu
@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_on_a_gpu_it_is_as_near_float32_as_padded_rows_are(tmp_path, config: PreTrainedConfig) -> None:
    saved(config, tmp_path)
    wanted = results(tmp_path, "padded", torch.float32, "cuda")
    padded, packed = (off_by(results(tmp_path, layout, torch.bfloat16, "cuda"), wanted)
                      for layout in ("padded", "varlen"))
    assert packed < 1.5 * padded and padded < 0.1


@on_gpu
def test_auto_is_varlen_on_a_gpu_in_bf16() -> None:
    assert resolve_layout("auto", "auto", torch.bfloat16) == ("varlen", varlen.TORCH_VARLEN)
    assert resolve_layout("auto", "auto", torch.float32) == ("padded", "sdpa")


#: What the kernels can't do ► a model that has it.
UNABLE = {
    "a cap on its attention's scores": Gemma2Config(**SIZES, attn_logit_softcapping=50.0, final_logit_softcapping=None),
    "heads of 20 and values of 20": Qwen3Config(**SIZES | {"head_dim": 20}),
    "heads of 48 and values of 32": MiniCPM3Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"} | {"num_key_value_heads": 4}, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    "a mask of its own": DogeConfig(**SIZES),
    "attention that isn't told where sequences begin": StableLmConfig(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "attention in chunks": Llama4TextConfig(**SIZES, num_local_experts=1, intermediate_size_mlp=128,
                                            attention_chunk_size=64, moe_layers=[]),
}


@pytest.mark.parametrize("unable", UNABLE)
def test_a_model_that_the_kernels_cant_do_is_padded_and_a_choice_refused(tmp_path, monkeypatch, unable: str) -> None:
    hf = AutoModelForCausalLM.from_config(UNABLE[unable], dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.device("meta"):
        traits = traits_of(AutoModelForCausalLM.from_config(UNABLE[unable], dtype=torch.bfloat16), "model")
    monkeypatch.setattr(varlen, "why_not", lambda dtype: None)
    with pytest.warns(match=f"{hf.config.model_type} has {unable}"):
        assert load._layout_for(hf, traits, "auto", "auto")[0] == "padded"
    assert hf.config._attn_implementation == "sdpa"
    for layout, attention, named in (("varlen", "auto", "model.layout=varlen"),
                                     ("auto", varlen.TORCH_VARLEN, "model.attention=torch_varlen")):
        with pytest.raises(UserError) as told:
            load._layout_for(hf, traits, layout, attention)
        assert str(told.value) == (f"{named}: {hf.config.model_type} has {unable}: leave model.layout and "
                                   "model.attention at auto")


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_a_model_that_they_can_do_is_packed(tmp_path, monkeypatch, config: PreTrainedConfig) -> None:
    monkeypatch.setattr(varlen, "why_not", lambda dtype: None)
    policy = load_policy(saved(config, tmp_path), dtype=torch.bfloat16, chunk_tokens=64)
    assert (policy.layout, policy.hf.config._attn_implementation) == ("varlen", varlen.TORCH_VARLEN)


def test_it_is_refused_where_rows_are_padded() -> None:
    with pytest.raises(UserError, match=r"model\.attention=torch_varlen is for model\.layout=varlen"):
        resolve_layout("padded", varlen.TORCH_VARLEN, torch.bfloat16)


@pytest.mark.parametrize("more", [
    {"softcap": 1.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}, {"is_causal": False}, {"indices": torch.ones(2)}, {},
])
def test_what_the_kernels_dont_have_is_never_left_out_in_silence(more: dict[str, object]) -> None:
    tensor = torch.zeros(1, 2, 4, 32)
    with pytest.raises(NotImplementedError):
        varlen.torch_varlen(torch.nn.Module(), tensor, tensor, tensor, None, **more)
