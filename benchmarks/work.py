"""The work that every figure of a step is measured on: the same tokens for us, for the bare parts and for a peer.

Takes:  a folder; how many tokens a response has, and how unequal they are.
Gives:  `make_model`, `make_data`, Phase: steps on one distribution of lengths; `equal`, `log_normal`.
Knows:  a step: 8 prompts of 16 tokens, 8 samples each; the lengths are the same at every step.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS = 8, 8, 16
NUM_SEQUENCES = NUM_PROMPTS * GROUP_SIZE
SIGMA = 0.8
MODEL = "BENCH_MODEL"
CONTEXT = 2048
MICRO_BATCH_TOKENS = 4608  # 16 sequences of 16 + 256 tokens a micro-batch, with us and bare
KV_GIB, KV_TOKENS = 2.0, 272  # room for two batches in flight, in fp32, of sequences of so many tokens on average
VOCAB = 4096
#: Name ► hidden size, layers of a model: 29M parameters, 61M (245 MB in fp32), and one for what doesn't depend on it.
SIZES = {"29M": (512, 8), "60M": (640, 11), "small": (128, 2)}


def model_of(folder: Path) -> Path:
    """The one that is measured: BENCH_MODEL in the environment names another than that of 29M."""
    return folder / os.environ.get(MODEL, "29M")


def equal(tokens: int) -> list[int]:
    return [tokens] * NUM_SEQUENCES


def log_normal(tokens: int, sigma: float = SIGMA) -> list[int]:
    """Lengths at equally likely quantiles, in a random order; together as many tokens as `equal` has.

    >>> sum(log_normal(256)) == sum(equal(256)), max(log_normal(256))
    (True, 1299)
    """
    normal = statistics.NormalDist(0.0, sigma)
    drawn = [pow(2.718281828459045, normal.inv_cdf((i + 0.5) / NUM_SEQUENCES)) for i in range(NUM_SEQUENCES)]
    lengths = [max(1, round(tokens * NUM_SEQUENCES * x / sum(drawn))) for x in drawn]
    lengths[NUM_SEQUENCES // 2] += tokens * NUM_SEQUENCES - sum(lengths)  # what rounding lost
    random.Random(0).shuffle(lengths)
    return lengths


@dataclass(frozen=True)
class Phase:
    """Steps of one kind; the first `warm_up` are not measured."""

    name: str
    lengths: list[int]  # of a step's sequences, group by group
    warm_up: int
    runs: int

    @property
    def steps(self) -> int:
        return self.warm_up + self.runs

    @property
    def groups(self) -> list[list[int]]:
        return [self.lengths[i : i + GROUP_SIZE] for i in range(0, NUM_SEQUENCES, GROUP_SIZE)]


def kv_gib(phases: Sequence[Phase]) -> float:
    """Room for two batches in flight of the longest phase. Not more: a processor takes seconds for each GiB."""
    most = max(sum(phase.lengths) / len(phase.lengths) for phase in phases)
    return max(0.25, KV_GIB * (PROMPT_TOKENS + most) / KV_TOKENS)


def micro_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of each padded micro-batch, the longest first: whole lengths in tokens. The trainer's own plan."""
    import numpy as np

    from flux_ray.batch import pack
    from flux_ray.records import Sample

    samples = [Sample(np.zeros(n, np.int32), np.ones(n, bool), np.ones(n, np.float32))
               for n in (PROMPT_TOKENS + length for length in lengths)]
    packed = pack(samples, max_tokens=MICRO_BATCH_TOKENS, padded=True)
    return [micro_batch.lengths_B.tolist() for micro_batch in packed]


def make_data(file: Path, phases: Sequence[Phase]) -> None:
    """One row a prompt, in the order of the steps; `lengths` says how long its responses become."""
    groups = [group for phase in phases for _ in range(phase.steps) for group in phase.groups]
    rows = [{"prompt": str(10 ** (PROMPT_TOKENS - 1) + i), "lengths": group} for i, group in enumerate(groups)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, size: str) -> int:
    """Qwen3's architecture, random weights, a tokenizer of single characters. Gives the number of parameters."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging as hf_logging

    from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer

    hf_logging.disable_progress_bar()  # for files that take no time
    hidden, layers = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
                         max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_id=EOS_ID,
                         pad_token_id=PAD_ID, bos_token_id=None)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.num_parameters()


def options(folder: Path, *, dtype: str, phases: Sequence[Phase]) -> dict[str, Any]:
    """Config of a run over these phases, before what a figure adds."""
    longest = max(max(phase.lengths) for phase in phases)
    return {
        "model.path": str(model_of(folder)), "model.dtype": dtype, "data.shuffle": False,
        "reward.functions": ["length"], "reward.options": {"length": {"target": 10}},
        "algo.beta": 0.0, "algo.entropy_coef": 0.0, "batch.prompts_per_step": NUM_PROMPTS,
        "batch.max_tokens_per_micro_batch": MICRO_BATCH_TOKENS, "rollout.group_size": GROUP_SIZE,
        "rollout.max_tokens": longest, "rollout.max_model_len": PROMPT_TOKENS + longest, "rollout.ignore_eos": True,
        "rollout.kv_cache_gib": kv_gib(phases), "driver.num_steps": sum(phase.steps for phase in phases),
        "observability.samples_per_step": 0, "observability.progress": False, "cluster.device": "cpu",
    }
