"""A supervised step: learns the next token of completions.

Takes:  this rank's samples.
Gives:  `run`: an update and its metrics; `measure`: the metrics alone, of samples that are not trained on.
Knows:  the loss is the token mean of -log p over all ranks' loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flux_ray.algo import supervised
from flux_ray.batch import MicroBatch, loss_weights
from flux_ray.config import BatchConfig
from flux_ray.observability.described import Described
from flux_ray.observability.metrics import Mean, Metric, Sum, merge
from flux_ray.records import Sample
from flux_ray.train.engine import Asked, Engine
from flux_ray.train.rank_batch import packed

ASKED: Asked = {"temperature": 1.0, "with_entropy": False}  # of the policy

METRICS = (Described("train/num_tokens", "tokens that were learned", "token", "completions' tokens", "",
                     "less than you expect: rows are cut or left out; `run.log` counts them"),)


def run(engine: Engine, config: BatchConfig, samples: Sequence[Sample], *, total_updates: int) -> dict[str, Metric]:
    """One update on all ranks' samples, whose weights are made here. Collective."""
    tokens = engine.sum(torch.tensor([sum(int(s.loss_mask.sum()) for s in samples)]))
    weighted = [replace(s, loss_weights=loss_weights(supervised.AGGREGATION, loss_mask=s.loss_mask, max_tokens=1))
                for s in samples]
    return engine.update(packed(engine, config, weighted), _next_token_loss, total_updates=total_updates,
                         divisor=max(int(tokens), 1), **ASKED)


def measure(engine: Engine, config: BatchConfig, samples: Sequence[Sample]) -> dict[str, Metric]:
    """What `run` would have measured, without gradients. Collective."""
    micro_batches = packed(engine, config, samples)
    values = engine.forward(micro_batches, **ASKED)
    return merge([_measured(m, logprobs_S) for m, logprobs_S in zip(micro_batches, values, strict=True)])


def _next_token_loss(
    i: int, micro_batch: MicroBatch, logprobs_S: Tensor, entropy_S: Tensor | None,
) -> tuple[Tensor, dict[str, Metric]]:
    loss = supervised.next_token_loss(logprobs_S, loss_weights=micro_batch.loss_weights_S)
    return loss, _measured(micro_batch, logprobs_S)


def _measured(micro_batch: MicroBatch, logprobs_S: Tensor) -> dict[str, Metric]:
    num_tokens = int(micro_batch.loss_mask_S.sum())
    return {"train/loss": Mean(-float(logprobs_S.detach().sum()), num_tokens), "train/num_tokens": Sum(num_tokens)}
