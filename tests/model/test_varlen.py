"""Sequences in one row, apart by their borders: the same log-probs and gradients as in rows of their own.

The kernels need a GPU; elsewhere the formula stands in for them, by torch's own description of their arguments.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, PreTrainedConfig, Qwen3Config

from flux_ray.batch import MicroBatch, make_micro_batch
from flux_ray.errors import UserError
from flux_ray.model import load_policy, varlen
from flux_ray.model.load import resolve_layout
from flux_ray.records import Sample

pytestmark = pytest.mark.unit
on_gpu = pytest.mark.skipif(varlen.why_not(torch.bfloat16) is not None, reason="needs a GPU from Ampere on")
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
             bos_token_id=None, initializer_range=0.15)
MODELS = [Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=16)]
LENGTHS = (140, 3, 57, 200)


def by_the_formula(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as it is documented, sequence after sequence."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32 and window_size[1] == 0
    assert max_q == max_k == int(cu_seq_q.diff().max()) and enable_gqa == (query.shape[1] != key.shape[1])
    shared, outputs = query.shape[1] // key.shape[1], []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (t[start:stop].transpose(0, 1) for t in (query, key, value))
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
        scores = q @ k.repeat_interleave(shared, 0).transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((probs @ v.repeat_interleave(shared, 0)).transpose(0, 1))
    return torch.cat(outputs)


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
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_the_formula)
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


def test_a_model_that_the_kernels_cant_do_is_padded_and_a_choice_refused(tmp_path, monkeypatch) -> None:
    config = Gemma2Config(**SIZES, attn_logit_softcapping=50.0, final_logit_softcapping=None)
    saved(config, tmp_path)
    monkeypatch.setattr(varlen, "why_not", lambda dtype: None)
    assert load_policy(tmp_path, dtype=torch.bfloat16, chunk_tokens=64).layout == "padded"
    with pytest.raises(UserError, match="layout=varlen: gemma2 has a cap on its attention's scores"):
        load_policy(tmp_path, dtype=torch.bfloat16, layout="varlen", chunk_tokens=64)
    assert varlen.why_not_this(Qwen3Config(**SIZES | {"head_dim": 20})) == "heads of 20"


def test_it_is_refused_where_rows_are_padded() -> None:
    with pytest.raises(UserError, match=r"model\.attention=torch_varlen is for model\.layout=varlen"):
        resolve_layout("padded", varlen.TORCH_VARLEN, torch.bfloat16)


@pytest.mark.parametrize("more", [{"softcap": 1.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}])
def test_what_the_kernels_dont_have_is_never_left_out_in_silence(more: dict[str, object]) -> None:
    tensor = torch.zeros(1, 2, 4, 32)
    with pytest.raises(NotImplementedError, match=next(iter(more))):
        varlen.torch_varlen(torch.nn.Module(), tensor, tensor, tensor, None, **more)
