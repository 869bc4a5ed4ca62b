"""The work of benchmarks.gpu: a model's shape, how long responses are, what a step costs in FLOPs.

Gives:  `Size` and the two there are (a .5B model for GPUs, a tiny one that a CPU can run too); `make_model`,
        `make_rows`, `made_groups`; `step_flops`; `micro_batch_tokens`.
Knows:  the same lengths are sampled and trained on at every step: log-normal ones, as rollouts have them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.work import GROUP_SIZE, log_normal
from flux_ray.records import FINISH_STOP, Prompt, RolloutGroup, ScoredGroup, Trajectory

FIRST_ID = 3  # ids below are the tokenizer's special ones
#: GPU memory in GiB ► tokens of a micro-batch: 16,384 of them took 31 GiB with the .5B model, engine not counted.
MICRO_BATCH_TOKENS = ((70, 16_384), (40, 8192), (0, 4096))


@dataclass(frozen=True)
class Size:
    """A model of Qwen2's architecture, and the work that is measured on it. Lengths are in tokens."""

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    dtype: str
    batches: int  # of 64 sequences: what a step of the loop samples and trains on
    tokens: int  # of a response in the loop, on average
    train_tokens: int  # the same where training is measured alone, on 64 sequences
    prompt_tokens: int
    head_tokens: int  # whose log-probs are measured alone

    @property
    def lengths(self) -> list[int]:
        """Of the responses of one step of the loop."""
        return self.batches * log_normal(self.tokens)

    @property
    def prompts(self) -> int:
        """Of one step of the loop."""
        return len(self.lengths) // GROUP_SIZE

    @property
    def context(self) -> int:
        return self.prompt_tokens + max(*self.lengths, *log_normal(self.train_tokens))


#: Qwen2.5-0.5B's shape: 494M parameters.
HALF_BILLION = Size(
    "Qwen2.5-0.5B's shape", vocab=151_936, hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2,
    dtype="bfloat16", batches=4, tokens=256, train_tokens=1024, prompt_tokens=64, head_tokens=8 * 4096)
#: For the way through, not for figures.
TINY = Size(
    "tiny", vocab=512, hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2,
    dtype="float32", batches=1, tokens=12, train_tokens=24, prompt_tokens=8, head_tokens=256)


def step_flops(size: Size, lengths: Sequence[int]) -> float:
    """Forward and backward of sequences of these lengths, prompts included: 6 a weight and token, and 12 a layer,
    hidden number and pair of tokens, of which causality leaves half (Chowdhery et al. 2022, PaLM, appendix B). What is
    done twice doesn't count, nor does the look-up of embeddings.
    """
    head_dim = size.hidden // size.heads
    attention = 2 * size.hidden * size.hidden + 2 * size.hidden * size.kv_heads * head_dim
    weights = size.layers * (attention + 3 * size.hidden * size.intermediate) + size.hidden * size.vocab
    return 6.0 * weights * sum(lengths) + 6.0 * size.layers * size.hidden * sum(n * n for n in lengths)


def micro_batch_tokens(memory_gib: float) -> int:
    """Of a GPU with so much memory.

    >>> micro_batch_tokens(79.2), micro_batch_tokens(23.7)
    (16384, 4096)
    """
    return next(tokens for least_gib, tokens in MICRO_BATCH_TOKENS if memory_gib >= least_gib)


def make_model(folder: Path, size: Size, *, device: str, seed: int = 0) -> int:
    """Random weights, a tokenizer of single characters. Gives the number of parameters."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(8192, size.context), tie_word_embeddings=True, eos_token_id=EOS_ID,
        pad_token_id=PAD_ID, bos_token_id=None, rope_theta=1e6)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(getattr(torch, size.dtype))
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.num_parameters()


def make_rows(file: Path, size: Size, *, steps: int) -> None:
    """A row for each prompt of so many steps; `lengths` says how long its responses become."""
    groups = [size.lengths[i : i + GROUP_SIZE] for i in range(0, len(size.lengths), GROUP_SIZE)] * steps
    first = 10 ** (size.prompt_tokens - 1)  # a digit is a token
    rows = [{"prompt": str(first + i), "lengths": lengths} for i, lengths in enumerate(groups)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_groups(size: Size, lengths: Sequence[int]) -> tuple[list[RolloutGroup], list[ScoredGroup]]:
    """Groups as rollouts would bring them, random tokens and rewards."""
    rng = np.random.default_rng(0)
    groups, scores = [], []
    for uid in range(len(lengths) // GROUP_SIZE):
        prompt_ids = rng.integers(FIRST_ID, size.vocab, size.prompt_tokens).astype(np.int32)
        trajectories = []
        for length in lengths[uid * GROUP_SIZE : (uid + 1) * GROUP_SIZE]:
            ids = np.concatenate([prompt_ids, rng.integers(FIRST_ID, size.vocab, length).astype(np.int32)])
            mask = np.arange(len(ids)) >= size.prompt_tokens
            logprobs = np.where(mask, -np.log(size.vocab), 0).astype(np.float32)
            trajectories.append(Trajectory(ids, mask, logprobs, np.where(mask, 0, -1).astype(np.int32),
                                           size.prompt_tokens, FINISH_STOP))
        groups.append(RolloutGroup(Prompt(uid, uid, "", prompt_ids, {}, GROUP_SIZE, 0), tuple(trajectories)))
        rewards = rng.normal(size=GROUP_SIZE)
        scores.append(ScoredGroup(
            uid=uid, rewards=rewards, task_rewards=rewards, parts={},
            num_tokens=np.array([t.num_tokens for t in trajectories]),
            num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
            truncated=np.zeros(GROUP_SIZE, bool), oldest_version=0))
    return groups, scores
