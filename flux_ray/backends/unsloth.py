"""Runs a config through TRL's trainers on a model that Unsloth opened (a GPU is needed).

Takes:  a Config, callbacks.
Gives:  what the TRL backend gives.
Knows:  Unsloth must be imported before TRL, whose trainers it patches; its patches know no ratio of sequences.
Never:  starts without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flux_ray.backends import trl
from flux_ray.backends.trl_settings import check_unsloth
from flux_ray.config import Config
from flux_ray.errors import UserError
from flux_ray.model import context_length
from flux_ray.observability.callbacks import Callback
from flux_ray.run import TrainingResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(config: Config, *, callbacks: Sequence[Callback] = ()) -> TrainingResult:
    """Train as the config says. UserError: no GPU, no unsloth, or an algorithm that unsloth doesn't have."""
    import torch

    check_unsloth(config)
    if not torch.cuda.is_available():
        raise UserError("backend=unsloth needs a GPU, and there is none here: use backend=ray or backend=trl")
    trl.require("unsloth", backend="unsloth", install="pip install --no-deps unsloth unsloth_zoo, over 'flux-ray[trl]'")
    import unsloth  # noqa: F401  # patches trl, so it comes first

    return trl.train(config, callbacks=callbacks, load_model=_load)


def _load(config: Config, device: str) -> PreTrainedModel:
    from unsloth import FastLanguageModel

    longest = config.rollout.max_model_len or context_length(str(config.model.path))
    model, _ = FastLanguageModel.from_pretrained(
        model_name=config.model.path, max_seq_length=longest, load_in_4bit=False, full_finetuning=True,
    )
    return model
