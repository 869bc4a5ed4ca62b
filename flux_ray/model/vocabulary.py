"""How many tokens a model knows.

Takes:  a model's folder or hub name.
Gives:  `vocabulary_size`.
"""

from __future__ import annotations

import transformers


def vocabulary_size(path: str | None) -> int | None:
    """Rows of the model's embedding, as its config has them; None where there is no model, or its config doesn't say.

    A tokenizer may know more tokens: one that was added after the model was made has no row.
    """
    if path is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # whoever opens the model says what is wrong with it
        return None
    return getattr(config.get_text_config(), "vocab_size", None)
