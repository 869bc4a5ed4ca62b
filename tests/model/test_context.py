"""How long a text a model takes, and where it begins to compute otherwise, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from flux_ray.errors import UserError
from flux_ray.model import context_length, longest_context, turns

pytestmark = pytest.mark.unit
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**rope: Any) -> PreTrainedConfig:
    return LlamaConfig(**SIZES, intermediate_size=48, max_position_embeddings=100,
                       **({"rope_scaling": rope} if rope else {}))


@pytest.mark.parametrize("config, length, at", [
    (llama(), 100, []),
    (llama(rope_type="linear", factor=4.0, rope_theta=1e4), 400, []),
    (llama(rope_type="dynamic", factor=4.0, rope_theta=1e4), 100, []),
    (Phi3Config(**SIZES, intermediate_size=48, max_position_embeddings=100, original_max_position_embeddings=40,
                pad_token_id=0, rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 8, "rope_theta": 1e4,
                                              "long_factor": [2.0] * 8}), 40, [40]),
    (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=25, rope_theta=1e4), 100, [25]),
    (Qwen3Config(**SIZES, intermediate_size=48, max_position_embeddings=100, use_sliding_window=True,
                 sliding_window=20, max_window_layers=0), 100, [20]),
    (GPT2Config(n_positions=70), 70, []),
], ids=["plain", "linear", "dynamic", "longrope", "yarn", "window", "gpt2"])
def test_context_and_turns(tmp_path: Path, config: PreTrainedConfig, length: int, at: list[int]) -> None:
    config.save_pretrained(tmp_path)
    assert (context_length(tmp_path), longest_context(tmp_path), turns(tmp_path)) == (length, length, at)


def test_a_config_that_names_none(tmp_path: Path) -> None:
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    assert longest_context(tmp_path) is None
    with pytest.raises(UserError, match=r"names no length of its context .*: set rollout\.max_model_len"):
        context_length(tmp_path)
