"""A language model as this system uses it: packed micro-batch in, log-probs and entropy of its loss tokens out.

Takes:  a micro-batch on the flat token axis S, a temperature.
Gives:  log p(token i | before) at position i, of softmax(logits / temperature) in fp32, and the entropy there.
Knows:  three layouts: padded rows, one row with a block-diagonal mask, one row for flash attention.
Never:  makes logits of prompt tokens, or a tensor of all tokens x vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flux_ray.model.head import LogprobHead, put_in_place

LAYOUTS = ("padded", "block_diagonal", "varlen")


class PolicyModel(nn.Module):
    """A transformers causal language model whose head gives log-probs. Parameters are named `hf.` + their own names."""

    def __init__(self, hf: nn.Module, *, layout: str, chunk_tokens: int, logit_scale: float = 1.0) -> None:
        super().__init__()
        assert layout in LAYOUTS, layout
        self.hf = hf
        self.layout = layout
        self.original_config: Any = hf.config
        put_in_place(hf.get_output_embeddings(), logit_scale=logit_scale, chunk_tokens=chunk_tokens)

    @property
    def head(self) -> LogprobHead:
        return self.hf.get_output_embeddings()

    def forward(self, micro_batch: Any, *, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """((S,) log-probs, (S,) entropy or None), float32, 0 where the micro-batch's loss_mask_S is False.

        The head runs even when no position is wanted: under ZeRO-3 every rank must call every module equally often.
        """
        tokens_S = micro_batch.token_ids_S
        wanted_N = micro_batch.loss_mask_S.nonzero()[:, 0]
        if self.layout == "padded":
            hidden_RH, rows_S = self._hidden_padded(tokens_S, micro_batch)
        else:
            hidden_RH, rows_S = self._hidden_flat(tokens_S, micro_batch)
        # The first token of a sequence is never wanted, so the row before a wanted token is its own sequence's.
        result_2N = self.head(hidden_RH, rows_S[wanted_N] - 1, tokens_S[wanted_N], temperature, with_entropy)
        result_2S = result_2N.new_zeros(2, len(tokens_S)).index_copy(1, wanted_N, result_2N)
        return result_2S[0], result_2S[1] if with_entropy else None

    def _hidden_padded(self, tokens_S: Tensor, micro_batch: Any) -> tuple[Tensor, Tensor]:
        """Hidden states of rows padded at their right, and where each flat token lies among them.

        Causal attention alone keeps the padding out of every real token's sight, so no mask is given.
        """
        lengths_B = micro_batch.lengths_B  # on the CPU: no shape waits for a device
        num_rows, width = len(lengths_B), int(lengths_B.max())
        row_S = torch.repeat_interleave(torch.arange(num_rows), lengths_B).to(tokens_S.device)
        rows_S = row_S * width + micro_batch.position_ids_S
        ids_BL = torch.zeros(num_rows * width, dtype=torch.long, device=tokens_S.device)
        ids_BL[rows_S] = tokens_S
        hidden_BLH = self._run(ids_BL.view(num_rows, width))
        return hidden_BLH.flatten(0, 1), rows_S

    def _hidden_flat(self, tokens_S: Tensor, micro_batch: Any) -> tuple[Tensor, Tensor]:
        """Hidden states of all sequences in one row; attention stays within each of them."""
        lengths_B = micro_batch.lengths_B
        extra: dict[str, Any] = {}
        if self.layout == "varlen":  # flash attention: written, not yet run on a GPU
            bounds = nn.functional.pad(lengths_B.cumsum(0), (1, 0)).to(tokens_S.device, torch.int32)
            longest = int(lengths_B.max())
            extra = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        # Without a mask, transformers reads the borders from position ids that start again, sliding windows included.
        positions_1S = micro_batch.position_ids_S[None]
        hidden_1SH = self._run(tokens_S[None], position_ids=positions_1S, **extra)
        return hidden_1SH[0], torch.arange(len(tokens_S), device=tokens_S.device)

    def _run(self, ids_BL: Tensor, **extra: Any) -> Tensor:
        return self.hf.base_model(input_ids=ids_BL, use_cache=False, **extra)[0]
