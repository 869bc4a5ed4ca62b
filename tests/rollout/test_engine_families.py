"""Families of models in a real engine: its log-probs are the trainer's, before and after each of two updates."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from transformers import FalconH1Config

from flux_ray.config import LoraConfig
from flux_ray.errors import UserError
from flux_ray.rollout.known_models import check_served, engine_args_of
from tests.families import FAMILIES, NOT_SERVED, WINDOW
from tests.family_gaps import BEGIN, DOCS, END, measure, rows_of

MAX_GAP = 2e-5  # of log-probs of down to -10 between engine and trainer, in float32
A_FEW = ("Gemma 2",)  # two caps and a window, a tied head; below experts, adapters and a head of its own


@pytest.mark.system
@pytest.mark.parametrize("name", [
    name if name in A_FEW else pytest.param(name, marks=pytest.mark.all)
    for name in FAMILIES if name not in NOT_SERVED])
def test_engine_and_trainer_agree_over_two_updates(tmp_path: Path, name: str) -> None:
    gaps = asyncio.run(measure(name, tmp_path))
    assert gaps.pop("moved") > 0.05, "the weights hardly moved: agreement says nothing"
    assert max(gaps.values()) < MAX_GAP, gaps


@pytest.mark.system
def test_engine_and_trainer_agree_over_two_updates_of_experts_adapters(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8.0, targets=["experts", "q_proj"])
    gaps = asyncio.run(measure("Qwen 3 MoE", tmp_path, lora=lora))
    assert gaps.pop("moved") > 0.05, "the weights hardly moved: agreement says nothing"
    assert max(gaps.values()) < MAX_GAP, gaps


@pytest.mark.unit
def test_a_model_that_vllm_computes_otherwise_is_refused(tmp_path: Path) -> None:
    FAMILIES["Gemma 2"]().save_pretrained(tmp_path / "attention")
    check_served(str(tmp_path / "attention"), "cpu")
    FAMILIES["Bloom"]().save_pretrained(tmp_path / "bloom")
    FAMILIES["LFM 2"]().save_pretrained(tmp_path / "conv")
    FalconH1Config(vocab_size=64, hidden_size=64).save_pretrained(tmp_path / "mamba")
    for name, told in (("bloom", "the exact GELU for its tanh approximation"), ("conv", "keep a state (conv): vLLM's"),
                       ("mamba", "has layers that keep a state (hybrid")):
        with pytest.raises(UserError, match=re.escape(told)):
            check_served(str(tmp_path / name), "cpu")
    check_served(str(tmp_path / "conv"), "cuda")
    check_served(str(tmp_path / "conv"), "cpu", allow_gap=True)
    FAMILIES["DeepSeek-V3"]().save_pretrained(tmp_path / "mla")
    with pytest.raises(UserError, match=r"latent attention \(MLA\): vLLM's engine on CPU gives queries other rotary"):
        check_served(str(tmp_path / "mla"), "cpu")
    check_served(str(tmp_path / "mla"), "cuda")
    FAMILIES["gpt-oss"]().save_pretrained(tmp_path / "gpt-oss")
    with pytest.raises(UserError, match="copies its experts and its attention sinks past vLLM's own"):
        check_served(str(tmp_path / "gpt-oss"), "cuda", allow_gap=True)
    FAMILIES["Qwen 2 (window)"]().save_pretrained(tmp_path / "some layers")
    with pytest.raises(UserError, match="has a sliding window in some layers alone"):
        check_served(str(tmp_path / "some layers"), "cuda", allow_gap=True)


@pytest.mark.unit
def test_a_window_that_vllm_reads_otherwise_is_put_right(tmp_path: Path) -> None:
    FAMILIES["Cohere 2"]().save_pretrained(tmp_path / "cohere2")
    assert engine_args_of(str(tmp_path / "cohere2")) == {"hf_overrides": {"sliding_window": WINDOW - 1}}
    FAMILIES["Mistral"]().save_pretrained(tmp_path / "mistral")
    assert engine_args_of(str(tmp_path / "mistral")) == {}


@pytest.mark.unit
def test_the_page_has_a_row_for_every_family() -> None:
    table = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = rows_of(table)
    assert list(rows) == list(FAMILIES)
    for name, line in rows.items():
        gap, rest = line.strip("| ").split(" | ")[1:]
        if name in NOT_SERVED:
            assert gap == "—" and "refused at start" in rest
        else:
            assert float(gap) < MAX_GAP
