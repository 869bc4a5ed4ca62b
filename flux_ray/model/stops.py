"""The tokens that end a response.

Takes:  a model's folder or hub name, its tokenizer.
Gives:  `stop_token_ids`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def stop_token_ids(model_path: str | None, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those that the model's generation config names (a chat
    model's end of turn, say). Where a policy ends is where its training data, and what a reward model reads, end too.
    """
    ids = {tokenizer.eos_token_id}
    file = Path(str(model_path)) / "generation_config.json"
    if file.is_file():
        ids |= _listed(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    elif model_path is not None and not os.path.isdir(model_path):
        from transformers import GenerationConfig

        with suppress(OSError):  # a repository needn't have one
            ids |= _listed(GenerationConfig.from_pretrained(model_path).eos_token_id)
    return sorted(i for i in ids if i is not None)


def _listed(ids: int | list[int] | None) -> set[int | None]:
    return set(ids) if isinstance(ids, list) else {ids}
