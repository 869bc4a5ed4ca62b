"""Models that vLLM is known to compute otherwise than transformers, and so than the trainer.

Takes:  a model's folder or hub name.
Gives:  `engine_args_of`: options of vLLM that put it right; `check_served`: a UserError where none does.
Knows:  the reason for each, and the version of vLLM. A gap that isn't known is found by the run's first check.
Never:  changes what is saved: the trainer's config stays the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flux_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Kinds of layers that keep keys and values of tokens, as transformers' configs name them; others keep a state.
OF_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
#: Beginnings of options of layers that keep a state: mamba's, linear attention's, plain state space models'.
OF_STATES = ("mamba_", "ssm_", "linear_key_", "state_size")
#: Model type ► what vLLM 0.32's own file of it computes otherwise.
OTHERWISE = {"bloom": "is served with another activation than it has (the exact GELU for its tanh approximation): "
                      "log-probs are off by 1e-3"}
#: Model types whose layers must be alike for vLLM 0.32's qwen2.py.
ONE_KIND = ("qwen2", "qwen3")


#: Where a model is trained that no engine serves as it must.
WITHOUT_ENGINE = "what needs no engine trains it (algo=sft, algo=dpo)"
#: Model type ► why vLLM 0.32 can't give a running engine of it new weights.
NOT_UPDATED = {"gpt_oss": "can't take new weights: its loader copies its experts and its attention sinks past vLLM's "
                          "own reload, so that they would stay as they were, on CPU and GPU alike; "
                          f"{WITHOUT_ENGINE}"}


def engine_args_of(model_path: str) -> dict[str, dict[str, int]]:
    """Options for AsyncEngineArgs; empty for most models."""
    config = _config(model_path)
    if config.model_type == "cohere2" and config.sliding_window:
        # vLLM 0.32's commandr.py lets a token see sliding_window + 1 tokens, transformers sliding_window.
        return {"hf_overrides": {"sliding_window": config.sliding_window - 1}}
    return {}


def check_served(model_path: str, device: str, *, allow_gap: bool = False) -> None:
    """UserError for a model that vLLM doesn't start with, or (unless that is allowed) whose engine is known to give
    other log-probs than its own file in transformers."""
    config = _config(model_path)
    if config.model_type in ONE_KIND and len(set(config.layer_types or [])) > 1:
        raise UserError(f"model.path={model_path} ({config.model_type}) has a sliding window in some layers alone: "
                        "vLLM serves this family with one in all layers or in none (use_sliding_window, "
                        "max_window_layers)")
    if config.model_type in NOT_UPDATED:
        raise UserError(f"model.path={model_path} ({config.model_type}) {NOT_UPDATED[config.model_type]}")
    if allow_gap:
        return
    what = OTHERWISE.get(config.model_type)
    if what is None and device == "cpu":
        what = _state(config) or _latent(config)
    if what is not None:
        raise UserError(f"model.path={model_path} ({config.model_type}) {what}. weights.allow_logprob_gap=true trains "
                        "all the same")


def _state(config: PretrainedConfig) -> str | None:
    """What to say of layers that keep a state; None where a model has none.

    vLLM 0.32 on CPU keeps the state only where prefills are cut in chunks (ours are not). Without kept prefixes it
    gives LFM 2's tokens log-probs that are off by 1.
    """
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - OF_ATTENTION)
    options = sorted(name for name in config.to_dict() if name.startswith(OF_STATES))
    if not kinds and not options:
        return None
    return (f"has layers that keep a state ({', '.join(kinds or options[:1])}): vLLM's engine on CPU computes them "
            "otherwise than the trainer, one on a GPU may not (cluster.device=cuda)")


def _latent(config: PretrainedConfig) -> str | None:
    """What to say of an attention over compressed keys and values (MLA); None where a model has none.

    vLLM 0.32 on CPU turns queries by their positions with a kernel that takes those of one head for those of all.
    """
    if not getattr(config, "kv_lora_rank", None):
        return None
    return ("has latent attention (MLA): vLLM's engine on CPU gives queries other rotary positions than the trainer, "
            f"and log-probs are off by nats; one on a GPU may not (cluster.device=cuda), and {WITHOUT_ENGINE}")


def _config(model_path: str) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path).get_text_config()
