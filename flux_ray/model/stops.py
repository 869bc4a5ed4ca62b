"""The tokens that end a response.

Takes:  a model's folder or hub name, its tokenizer.
Gives:  `stop_token_ids`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from flux_ray.hugging_face import Tokenizer


def stop_token_ids(model_path: str | None, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those that the model's generation config names (a chat
    model's end of turn, say), or its config where there is no generation config, as transformers takes them. Where a
    policy ends is where its training data, and what a reward model reads, end too.
    """
    ids = {tokenizer.eos_token_id}
    if model_path is not None and os.path.isdir(model_path):
        files = (Path(model_path) / name for name in ("generation_config.json", "config.json"))
        file = next((file for file in files if file.is_file()), None)
        ids |= _listed(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")) if file else set()
    elif model_path is not None:
        ids |= _listed(_of_the_hub(model_path))
    return sorted(i for i in ids if i is not None)


def _of_the_hub(name: str) -> int | list[int] | None:
    from transformers import AutoConfig, GenerationConfig

    for opener in (GenerationConfig, AutoConfig):
        with suppress(OSError):  # a repository needn't have a generation config
            return getattr(opener.from_pretrained(name), "eos_token_id", None)
    return None


def _listed(ids: int | list[int] | None) -> set[int | None]:
    return set(ids) if isinstance(ids, list) else {ids}
