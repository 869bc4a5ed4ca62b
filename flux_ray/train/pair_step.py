"""A step on preference pairs: one optimizer update from the log-probs, or the scores, of both responses.

Takes:  this rank's pairs with the reference's log-probs of them.
Gives:  `run`: an update and its metrics; `measure`: the metrics alone, of pairs that are not trained on.
Knows:  both responses of a pair lie side by side in one micro-batch; a pair weighs 1/N of all ranks' pairs.
Never:  splits a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flux_ray import algo
from flux_ray.batch import MicroBatch, pack, pair_samples
from flux_ray.config import Config, ObjectiveConfig, PairsAlgoConfig
from flux_ray.model import ScoreModel, last_token
from flux_ray.observability.metrics import Metric, merge
from flux_ray.records import PreferencePair
from flux_ray.train.engine import Asked, Engine

PAIR = 2  # samples of a pair


@dataclass(frozen=True)
class PairShare:
    """This rank's pairs. `reference_logprobs`: (chosen, rejected) of each, sums over the response; None: not needed."""

    pairs: Sequence[PreferencePair]
    reference_logprobs: Sequence[tuple[float, float]] | None


def run(engine: Engine, config: Config, share: PairShare) -> dict[str, Metric]:
    """One update on all ranks' pairs. Collective."""
    objective = _objective(engine, config, share)
    return engine.update(_packed(engine, config, share), objective, total_updates=config.driver.num_steps,
                         **_asked(config))


def measure(engine: Engine, config: Config, share: PairShare) -> dict[str, Metric]:
    """What `run` would have measured, without gradients. Collective."""
    objective, micro_batches = _objective(engine, config, share), _packed(engine, config, share)
    values = engine.forward(micro_batches, **_asked(config))
    parts = [objective(i, micro_batch.to(values_S.device), values_S)
             for i, (micro_batch, values_S) in enumerate(zip(micro_batches, values, strict=True))]
    return merge([metrics for _, metrics in parts])


@dataclass(frozen=True)
class PairObjective:
    """The loss of one micro-batch, whose sequences are chosen, rejected, chosen, rejected …"""

    algo: ObjectiveConfig
    reference_N: Tensor | None  # of each sample, in the order before packing
    margins_N: Tensor  # of each sample: its pair's
    num_pairs: int  # of the step, over all ranks

    def __call__(
        self, i: int, micro_batch: MicroBatch, values_S: Tensor, entropy_S: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Metric]]:
        ids_B = micro_batch.sample_ids_B
        values_B2 = _per_sequence(values_S, micro_batch).view(-1, PAIR)
        if not isinstance(self.algo, PairsAlgoConfig):
            margins_B = self.margins_N[ids_B].view(-1, PAIR)[:, 0].to(values_S.device)
            return algo.score_objective(scores=values_B2, margins=margins_B, num_pairs=self.num_pairs)
        reference_B2 = None
        if self.reference_N is not None:
            reference_B2 = self.reference_N[ids_B].view(-1, PAIR).to(values_S.device)
        tokens_B2 = _per_sequence(micro_batch.loss_mask_S.to(values_S.dtype), micro_batch).view(-1, PAIR)
        return algo.preference_objective(
            self.algo, logprobs=values_B2, reference_logprobs=reference_B2, num_tokens=tokens_B2,
            num_pairs=self.num_pairs,
        )


def _per_sequence(values_S: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Sums over each sequence's loss tokens, (number of sequences,); values are 0 at all others."""
    sequence_S = torch.repeat_interleave(torch.arange(micro_batch.num_sequences), micro_batch.lengths_B)
    return values_S.new_zeros(micro_batch.num_sequences).index_add(0, sequence_S.to(values_S.device), values_S)


def _objective(engine: Engine, config: Config, share: PairShare) -> PairObjective:
    reference = share.reference_logprobs
    return PairObjective(
        algo=config.algo,
        reference_N=None if reference is None else torch.tensor(reference, dtype=torch.float32).flatten(),
        margins_N=torch.tensor([pair.margin for pair in share.pairs]).repeat_interleave(PAIR),
        num_pairs=int(engine.sum(torch.tensor(len(share.pairs)))),
    )


def _packed(engine: Engine, config: Config, share: PairShare) -> list[MicroBatch]:
    scored_at = None
    if isinstance(engine.model, ScoreModel):
        # Transformers will read the score of a text there. A new head is saved with a padding token that ends no text.
        pad_token_id = None if engine.model.has_new_head else engine.model.original_config.pad_token_id
        scored_at = partial(last_token, pad_token_id=pad_token_id)
    return pack(
        pair_samples(share.pairs, scored_at=scored_at), max_tokens=config.batch.max_tokens_per_micro_batch,
        max_samples=config.batch.micro_batch_size, padded=engine.model.layout == "padded", unit=PAIR,
        device=engine.device,
    )


def _asked(config: Config) -> Asked:
    if config.is_score:
        return {"at": "last"}
    return {"temperature": 1.0, "with_entropy": False}
