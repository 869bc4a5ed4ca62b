"""Tiny random models in Hugging Face layout, made where a test needs one.

Takes:  a folder, and how large and of which kind the model shall be.
Gives:  the folder with config, safetensors, generation config and a tokenizer of single characters: transformers and
        vLLM load it as it is (heads of 32, which vLLM's CPU attention needs).
Knows:  the character set; token i + 3 is CHARACTERS[i].
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as hf_logging

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-*/=() .,:?!#\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PAD_ID, EOS_ID, UNK_ID = range(3)


def tiny_tokenizer(vocab: int | None = 64, *, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character; characters beyond the vocabulary are <unk> (None: none is beyond it)."""
    words = [*SPECIAL, *characters][:vocab]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    folder: str | Path, *, tied: bool, vocab: int = 64, hidden: int = 64, layers: int = 2, seed: int = 0,
    context: int = 512, dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Qwen3 model and its tokenizer to `folder`; its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=context,
        tie_word_embeddings=tied, pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None,
        initializer_range=0.15,
    )
    return write_model(Qwen3ForCausalLM(config).to(dtype), folder)


def tiny_gpt2(folder: str | Path, *, context: int = 64) -> Path:
    """A random GPT-2: tied, its embedding and its layers called by other names than the others'."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=context, n_embd=64, n_layer=2, n_head=2, initializer_range=0.15,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=PAD_ID, eos_token_id=EOS_ID,
                        bos_token_id=None)
    return write_model(GPT2LMHeadModel(config), folder)


def write_model(model: PreTrainedModel, folder: str | Path) -> Path:
    """The model as users have one: with a generation config and a tokenizer beside it."""
    hf_logging.disable_progress_bar()
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return Path(folder)
