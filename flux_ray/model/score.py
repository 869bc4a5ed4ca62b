"""A model that gives one number where it is asked: a critic's value of a state, a reward model's score of a text.

Takes:  a micro-batch on the flat token axis S.
Gives:  (S,) float32 scores at its loss tokens; which token ends a text for transformers (`last_token`), and a padding
        token that never does (`padding_token`).
Knows:  transformers' sequence classification: the head's name, and that it reads a row at its last token but padding.
Never:  pools by itself: whoever asks masks the tokens that it wants a score at.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from flux_ray.hugging_face import Tokenizer
from flux_ray.model.packed import PackedModel, PackedTokens

HEAD = "score"  # what transformers calls the head of a decoder's sequence classification
PLACES = ("before", "last")


class ScoreHead(nn.Linear):
    """The model's own head (same parameter, same name), in fp32 whatever the model's type: values need the digits."""

    def forward(self, hidden_RH: Tensor, rows_N: Tensor) -> Tensor:  # type: ignore[override]
        """(N,) fp32 scores of `hidden_RH[rows_N]`."""
        return nn.functional.linear(hidden_RH[rows_N].float(), self.weight.float())[:, 0]


class ScoreModel(PackedModel):
    """A transformers sequence classification model with one label."""

    def __init__(self, hf: PreTrainedModel, *, layout: str, has_new_head: bool = False) -> None:
        super().__init__(hf, layout=layout)
        self.has_new_head = has_new_head
        getattr(hf, HEAD).__class__ = ScoreHead

    @property
    def head(self) -> ScoreHead:
        return getattr(self.hf, HEAD)

    def forward(self, micro_batch: PackedTokens, *, at: str) -> Tensor:
        """(S,) float32, 0 where the micro-batch's loss_mask_S is False.

        at="before": the value of the state in which token i was sampled, read at the token before it (a sequence's
        first token can't be asked for). at="last": the score of the text up to token i, read at token i itself.
        """
        assert at in PLACES, at
        wanted_N = micro_batch.loss_mask_S.nonzero()[:, 0]
        hidden_RH, rows_S = self.hidden_states(micro_batch)
        scores_N = self.head(hidden_RH, rows_S[wanted_N] - int(at == "before"))
        return scores_N.new_zeros(len(rows_S)).index_copy(0, wanted_N, scores_N)

    def pad_alike(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer to save beside the weights, padding with what the saved config calls padding.

        That is the config's own where the model came with its head, else `padding_token`.
        """
        config = self.original_config
        if self.has_new_head or config.pad_token_id is None:
            config.pad_token_id = padding_token(tokenizer)
        if config.pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        return tokenizer


def last_token(token_ids_T: np.ndarray, pad_token_id: int | None) -> int:
    """Position at which transformers reads a row's score: its last token that isn't padding, wherever padding stands.

    >>> last_token(np.array([5, 7, 9, 0, 0]), 0), last_token(np.array([5, 7, 9]), None)
    (2, 2)
    """
    real = np.flatnonzero(token_ids_T != pad_token_id) if pad_token_id is not None else np.arange(len(token_ids_T))
    return int(real[-1]) if len(real) else 0


def padding_token(tokenizer: Tokenizer) -> int | None:
    """A token to pad with that doesn't end texts: the tokenizer's own unless that is the end token.

    Were they one, transformers would take the end of a text for padding and read its score one token too early. None
    where every special token is the end token: transformers then scores one text at a time.
    """
    ends = {tokenizer.eos_token_id}
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    return next((token for token in candidates if token is not None and token not in ends), None)
