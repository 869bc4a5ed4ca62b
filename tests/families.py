"""Tiny random models of the families that people train, in Hugging Face layout.

Gives:  FAMILIES: family ► its config; `make_family`, which writes one to a folder with a tokenizer beside it.
Knows:  windows are of a few tokens, so that a short text leaves them; heads of 32, which vLLM's CPU attention needs;
        caps so low, and weights so large, that what is ignored shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.tiny import EOS_ID, PAD_ID, write_model

WINDOW = 8  # tokens of a sliding window
CONTEXT = 96
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": CONTEXT, "initializer_range": 0.15, "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID, "bos_token_id": None,
}
HEADS = {"head_dim": 32}
GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = ["sliding_attention", "full_attention"]


def _made(name: str, *without: str, **more: Any) -> Callable[[], PreTrainedConfig]:
    """A config of transformers' class `name`, of SIZES but for those in `without`."""
    sizes = {key: value for key, value in SIZES.items() if key not in without}
    return lambda: getattr(transformers, name)(**(sizes | more))


#: Family ► its config. A name in brackets is a variant that computes something more.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama": _made("LlamaConfig", **HEADS),
    "Llama (llama3 rope, biases, tied)": _made(
        "LlamaConfig", **HEADS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_scaling={"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 24, "rope_theta": 10000.0}),
    "Mistral": _made("MistralConfig", **HEADS, sliding_window=WINDOW),
    "Qwen 2": _made("Qwen2Config", tie_word_embeddings=True),
    "Qwen 2 (window)": _made("Qwen2Config", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "Qwen 3": _made("Qwen3Config", **HEADS, tie_word_embeddings=True),
    "Gemma": _made("GemmaConfig", **HEADS),
    "Gemma 2": _made("Gemma2Config", **HEADS, sliding_window=WINDOW, query_pre_attn_scalar=32, layer_types=LAYERS,
                     attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "Gemma 3": _made("Gemma3TextConfig", **HEADS, sliding_window=WINDOW, query_pre_attn_scalar=32, layer_types=LAYERS),
    "Phi": _made("PhiConfig", partial_rotary_factor=0.5),
    "Phi 3": _made("Phi3Config", sliding_window=WINDOW),
    "GPT-2": _made("GPT2Config", *SIZES.keys() - {"vocab_size", "initializer_range", "pad_token_id", "eos_token_id",
                                                 "bos_token_id"}, **GPT2_SIZES),
    "GPT-NeoX (Pythia)": _made("GPTNeoXConfig", "num_key_value_heads"),
    "OPT": _made("OPTConfig", "intermediate_size", "num_key_value_heads", "initializer_range", ffn_dim=96,
                 word_embed_proj_dim=64, init_std=0.15),
    "Bloom": _made("BloomConfig", "intermediate_size", "num_key_value_heads", "max_position_embeddings",
                   "num_attention_heads", "num_hidden_layers", n_layer=2, n_head=2),
    "Falcon": _made("FalconConfig", "intermediate_size", "num_key_value_heads", new_decoder_architecture=False),
    "Granite": _made("GraniteConfig", logits_scaling=4.0, attention_multiplier=0.1, embedding_multiplier=3.0,
                     residual_multiplier=0.5),
    "Cohere": _made("CohereConfig", logit_scale=0.25),
    "Cohere 2": _made("Cohere2Config", **HEADS, logit_scale=0.25, sliding_window=WINDOW, layer_types=LAYERS),
    "OLMo 2": _made("Olmo2Config"),
    "Starcoder 2": _made("Starcoder2Config", sliding_window=WINDOW),
    "GLM-4": _made("Glm4Config", **HEADS),
    "EXAONE 4": _made("Exaone4Config", **HEADS, sliding_window=WINDOW, layer_types=LAYERS),
    "SmolLM 3": _made("SmolLM3Config", no_rope_layers=[1, 0]),
    "LFM 2": _made("Lfm2Config", layer_types=["conv", "full_attention"], conv_dim=64,
                   block_dim=64, block_auto_adjust_ff_dim=False),
    "Mixtral": _made("MixtralConfig", **HEADS, **EXPERTS),
    "Qwen 2 MoE": _made("Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                        shared_expert_intermediate_size=32, tie_word_embeddings=True),
    "Qwen 3 MoE": _made("Qwen3MoeConfig", **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "OLMoE": _made("OlmoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "GLM-4 MoE": _made("Glm4MoeConfig", **HEADS, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
                       n_group=1, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1),
    "DeepSeek-V3": _made("DeepseekV3Config", "num_key_value_heads", n_routed_experts=4, num_experts_per_tok=2,
                         n_group=2, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1,
                         q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=16, v_head_dim=32,
                         num_key_value_heads=2, topk_method="noaux_tc", scoring_func="sigmoid"),
    "gpt-oss": _made("GptOssConfig", **HEADS, **EXPERTS, sliding_window=WINDOW, layer_types=LAYERS),
}

#: Those that are refused by their config, for what engines, on CPU at least, make of them.
NOT_SERVED = ("Qwen 2 (window)", "Bloom", "LFM 2", "DeepSeek-V3", "gpt-oss")
#: Mixtures of experts.
EXPERTS_FAMILIES = ("Mixtral", "Qwen 2 MoE", "Qwen 3 MoE", "OLMoE", "GLM-4 MoE", "DeepSeek-V3", "gpt-oss")

#: What is done otherwise for a family, as docs/models.md tells it.
NOTES = {
    "Gemma 2": "its own attention (`eager`), which caps its scores; the cap on logits is in our head",
    "GPT-NeoX (Pythia)": "its head goes to engines as `embed_out`, as checkpoints call it",
    "Falcon": "its own attention",
    "Cohere 2": "vLLM lets a token see one token more than its window: it is told of one less",
} | dict.fromkeys(EXPERTS_FAMILIES, "experts go one by one, as checkpoints keep them")


def make_family(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the family's tiny random model to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which would all be ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return write_model(model, folder)
