"""A language model as this system uses it: packed micro-batch in, log-probs and entropy of its loss tokens out.

Takes:  a micro-batch on the flat token axis S, a temperature.
Gives:  log p(token i | before) at position i, of softmax(logits / temperature) in fp32, and the entropy there.
Never:  makes logits of prompt tokens, or a tensor of all tokens x vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from flux_ray.model.head import HeadForm, LogprobHead, put_in_place
from flux_ray.model.packed import PackedModel, PackedTokens


class PolicyModel(PackedModel):
    """A transformers causal language model whose head gives log-probs."""

    def __init__(self, hf: PreTrainedModel, *, layout: str, chunk_tokens: int, head: HeadForm | None = None) -> None:
        super().__init__(hf, layout=layout)
        put_in_place(hf.get_output_embeddings(), form=head or HeadForm(), chunk_tokens=chunk_tokens)

    @property
    def head(self) -> LogprobHead:
        return self.hf.get_output_embeddings()

    def forward(
        self, micro_batch: PackedTokens, *, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """((S,) log-probs, (S,) entropy or None), float32, 0 where the micro-batch's loss_mask_S is False.

        The head runs even when no position is wanted: under ZeRO-3 every rank must call every module equally often.
        """
        tokens_S = micro_batch.token_ids_S
        wanted_N = micro_batch.loss_mask_S.nonzero()[:, 0]
        hidden_RH, rows_S = self.hidden_states(micro_batch)
        # The first token of a sequence is never wanted, so the row before a wanted token is its own sequence's.
        result_2N = self.head(hidden_RH, rows_S[wanted_N] - 1, tokens_S[wanted_N], temperature, with_entropy)
        result_2S = result_2N.new_zeros(2, len(tokens_S)).index_copy(1, wanted_N, result_2N)
        return result_2S[0], result_2S[1] if with_entropy else None
