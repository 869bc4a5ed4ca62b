"""The texts of responses, as rewards and people read them.

Takes:  token ids; a tokenizer; the tokens that end a response.
Gives:  `texts_of`.
Knows:  end and padding tokens are no part of a text; other special tokens (<answer>) are, unless an option says no.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def texts_of(
    token_ids: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase, *, end_ids: Collection[int],
    skip_special_tokens: bool,
) -> list[str]:
    """The text of each response (T,), without end and padding tokens, wherever they stand."""
    left_out = {*end_ids, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    kept = [[i for i in np.asarray(ids).tolist() if i not in left_out] for ids in token_ids]
    return tokenizer.batch_decode(kept, skip_special_tokens=skip_special_tokens)
