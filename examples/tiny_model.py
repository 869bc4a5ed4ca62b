"""A small Qwen3-architecture model with random weights, in Hugging Face layout.

Takes:  a trained or hand-made fast tokenizer, the sizes, a seed.
Gives:  a folder that transformers and vLLM load as it is: config, safetensors, tokenizer, generation config.
Knows:  which head sizes vLLM's CPU attention has (32, 64, 80 … 512).
Never:  sets torch's global seed: the caller's random state stays.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as hf_logging

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)  # ids 0, 1, 2


@dataclass(frozen=True)
class Sizes:
    """Of the model, in the words of transformers' Qwen3Config."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # the context, in tokens
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02  # standard deviation of the random weights


def save_model(
    tokenizer: Tokenizer, folder: Path, *, sizes: Sizes, seed: int, embedding_range: float | None = None
) -> int:
    """Write model and tokenizer into `folder`; the number of parameters. The same seed gives the same weights.

    `embedding_range`: standard deviation of untied input embeddings; None: as all weights.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=sizes.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    config = Qwen3Config(
        **asdict(sizes),
        vocab_size=len(fast),
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        if embedding_range is not None:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=embedding_range)
    model.generation_config = GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    hf_logging.disable_progress_bar()  # for a file that takes no time
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model.num_parameters()


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
