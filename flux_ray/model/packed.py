"""A transformers model run on packed micro-batches: what policy and score models share.

Takes:  a micro-batch on the flat token axis S.
Gives:  the hidden states of its tokens, and where each token's lies among them.
Knows:  three layouts: padded rows, one row with a block-diagonal mask, one row with the sequences' borders.
Never:  makes a head's output: those who have a head do.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flux_ray.model.hub_names import Parts
from flux_ray.model.lora import Adapter
from flux_ray.model.routing import Routing
from flux_ray.model.varlen import borders_of

LAYOUTS = ("padded", "block_diagonal", "varlen")


class PackedTokens(Protocol):
    """A micro-batch (flux_ray/batch), as far as models read it."""

    @property
    def token_ids_S(self) -> Tensor: ...
    @property
    def position_ids_S(self) -> Tensor: ...
    @property
    def loss_mask_S(self) -> Tensor: ...
    @property
    def lengths_B(self) -> Tensor: ...
    @property
    def sample_ids_B(self) -> Tensor: ...
    @property
    def experts_SLK(self) -> Tensor | None: ...


class PackedModel(nn.Module):
    """A causal transformers model under one layout. Parameters are named `hf.` + their own names."""

    def __init__(self, hf: PreTrainedModel, *, layout: str) -> None:
        super().__init__()
        assert layout in LAYOUTS, layout
        self.hf = hf
        self.layout = layout
        self.original_config: PretrainedConfig = hf.config  # what is saved beside the weights
        self.parts: Parts = {}  # how a checkpoint keeps the weights
        self.adapter: Adapter | None = None  # with train.lora, what `adapt` gave
        self.routing: Routing | None = None  # of a mixture of experts, where it is measured

    def hidden_states(self, micro_batch: PackedTokens) -> tuple[Tensor, Tensor]:
        """Rows of hidden states (R, H), and the row (S,) of each token. A sequence's rows follow one another."""
        run = self._hidden_padded if self.layout == "padded" else self._hidden_flat
        hidden_RH, rows_S = run(micro_batch.token_ids_S, micro_batch)
        if self.routing is not None:
            self.routing.take(rows_S)
        return hidden_RH, rows_S

    def _hidden_padded(self, tokens_S: Tensor, micro_batch: PackedTokens) -> tuple[Tensor, Tensor]:
        """Hidden states of rows padded at their right, and where each flat token lies among them.

        Causal attention alone keeps the padding out of every real token's sight, so no mask is given.
        """
        lengths_B = micro_batch.lengths_B  # on the CPU: no shape waits for a device
        num_rows, width = len(lengths_B), int(lengths_B.max())
        row_S = torch.repeat_interleave(torch.arange(num_rows), lengths_B).to(tokens_S.device)
        rows_S = row_S * width + micro_batch.position_ids_S
        ids_BL = torch.zeros(num_rows * width, dtype=torch.long, device=tokens_S.device)
        ids_BL[rows_S] = tokens_S
        self._expect(micro_batch, rows_S, ids_BL)
        hidden_BLH = self._run(ids_BL.view(num_rows, width))
        return hidden_BLH.flatten(0, 1), rows_S

    def _hidden_flat(self, tokens_S: Tensor, micro_batch: PackedTokens) -> tuple[Tensor, Tensor]:
        """Hidden states of all sequences in one row; attention stays within each of them."""
        lengths_B = micro_batch.lengths_B
        extra: dict[str, object] = {}
        if self.layout == "varlen":
            extra = borders_of(lengths_B, tokens_S.device)
        # Without a mask, transformers reads the borders from position ids that start again, sliding windows included.
        positions_1S = micro_batch.position_ids_S[None]
        rows_S = torch.arange(len(tokens_S), device=tokens_S.device)
        self._expect(micro_batch, rows_S, tokens_S)
        hidden_1SH = self._run(tokens_S[None], position_ids=positions_1S, **extra)
        return hidden_1SH[0], rows_S

    def _expect(self, micro_batch: PackedTokens, rows_S: Tensor, ids: Tensor) -> None:
        if self.routing is not None:
            self.routing.expect(micro_batch.experts_SLK, rows_S, len(ids))

    def _run(self, ids_BL: Tensor, **extra: object) -> Tensor:
        return self.hf.base_model(input_ids=ids_BL, use_cache=False, **extra)[0]
