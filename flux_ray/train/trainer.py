"""One data-parallel rank of the training group.

Takes:  Config and a place in the group; whole groups with scores and reference log-probs, or supervised samples.
Gives:  a StepReport per step; log-probs; whole weights; checkpoints and models on disk.
Knows:  what belongs to a step; how, is the modules' beside it.
Never:  knows of actors, engines or the driver: it runs in process, alone or beside other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flux_ray.algo import adapted_coef
from flux_ray.batch import MicroBatch, StepCounts, loss_weights
from flux_ray.config import Config
from flux_ray.errors import UserError
from flux_ray.model import load_policy, load_tokenizer, resolve_dtype, save_model
from flux_ray.model.scoring import by_group
from flux_ray.observability.metrics import Mean, Metric, Sum, read
from flux_ray.records import RolloutGroup, Sample, ScoredGroup, StepReport
from flux_ray.train import checkpoint, gather, policy_step, setup
from flux_ray.train.engine import Engine


class Trainer:
    """All methods but `weight_metadata` are collective: every rank calls them, in the same order."""

    def __init__(
        self, config: Config, *, rank: int, world_size: int, master_address: str, master_port: int, device: str,
    ) -> None:
        if config.model.path is None:
            raise UserError("model.path: no model given")
        deepspeed = setup.join(config, rank=rank, world_size=world_size, master_address=master_address,
                               master_port=master_port, device=device)
        torch.manual_seed(config.seed + rank)
        self.config = config
        self.version = 0
        self.kl_coef = config.algo.kl_coef  # of the next step: algo.kl_target moves it
        dtype = resolve_dtype(config.model.dtype, device)
        self.policy = load_policy(
            config.model.path, dtype=dtype, attention=config.model.attention, layout=config.model.layout,
            chunk_tokens=config.model.logprob_chunk_tokens, gradient_checkpointing=config.train.gradient_checkpointing,
        )
        self.engine = Engine(self.policy, config, deepspeed=deepspeed, dtype=dtype, device=device)

    def train_step(
        self, *, groups: Sequence[RolloutGroup], scores: Sequence[ScoredGroup],
        reference_logprobs: Sequence[Sequence[np.ndarray]] | None, version: int,
    ) -> StepReport:
        """One step on all ranks' groups (this rank's are given, maybe none). `version`: of the weights before the step.

        Raises FloatingPointError, naming update and rank, where a loss or a gradient isn't finite.
        """
        batch = policy_step.RankBatch(groups, scores, reference_logprobs, version)
        config = replace(self.config, algo=replace(self.config.algo, kl_coef=self.kl_coef))
        return self._report(policy_step.run(self.engine, config, batch), version + 1)

    def sft_step(self, samples: Sequence[Sample]) -> StepReport:
        """One supervised step: the token mean of -log p over all ranks' loss tokens (their weights are made here)."""
        tokens = self.engine.sum(torch.tensor([sum(int(s.loss_mask.sum()) for s in samples)]))
        counts = StepCounts(num_sequences=len(samples), num_tokens=int(tokens))
        weighted = [
            replace(s, loss_weights=loss_weights("token_mean", loss_mask=s.loss_mask, counts=counts, max_tokens=1))
            for s in samples
        ]
        metrics = self.engine.update(
            policy_step.packed(self.engine, self.config, weighted), _next_token_loss, temperature=1.0,
            with_entropy=False, total_updates=self.config.driver.num_steps,
        )
        return self._report(metrics, self.version + 1)

    def _report(self, metrics: dict[str, Metric], version: int) -> StepReport:
        self.version = version
        merged = self.engine.merge(metrics)
        paid = merged.get("actor/reward_kl")
        if self.config.algo.kl_target is not None and isinstance(paid, Mean) and paid.weight:
            self.kl_coef = adapted_coef(self.kl_coef, kl=paid.value, target=self.config.algo.kl_target,
                                        num_sequences=paid.weight, horizon=self.config.algo.kl_horizon)
        return StepReport(version, read(merged))

    def logprobs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        """Log-probs per group and trajectory, (T,) float32, 0 off the mask, at the rollout's temperature."""
        return by_group(policy_step.logprobs(self.engine, self.config, groups), groups)

    def weight_metadata(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        """(name, type, shape) of every weight that `iter_weights` gives, in its order."""
        return gather.metadata(self.policy)

    def iter_weights(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Whole weights by checkpoint name, bucket by bucket; a tensor is valid until the next is asked for."""
        return gather.iter_weights(self.policy, bucket_bytes)

    def save_checkpoint(self, folder: str | Path) -> None:
        """All that the next step depends on, in one folder, whole or not at all."""
        checkpoint.save(self.engine, folder, version=self.version, kl_coef=self.kl_coef)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Go on as if never stopped; any number of ranks, any ZeRO stage."""
        self.version, kl_coef = checkpoint.load(self.engine, folder)
        if self.config.algo.kl_target is not None:   # a fixed one is the config's, which a resume may change
            self.kl_coef = kl_coef

    def save_model(self, folder: str | Path) -> None:
        """The model in Hugging Face layout. Rank 0 writes."""
        weights = self.iter_weights(self.config.weights.bucket_mib * 2**20)
        if self.engine.rank == 0:
            save_model(folder, weights, hf_config=self.policy.original_config,
                       tokenizer=load_tokenizer(self.config.model.tokenizer or str(self.config.model.path)),
                       generation_config=self.policy.hf.generation_config)
        else:
            for _ in weights:
                pass
        dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _next_token_loss(
    i: int, micro_batch: MicroBatch, logprobs_S: Tensor, entropy_S: Tensor | None,
) -> tuple[Tensor, dict[str, Metric]]:
    loss = -(logprobs_S * micro_batch.loss_weights_S).sum()
    num_tokens = int(micro_batch.loss_mask_S.sum())
    total = -float(logprobs_S.detach().sum())
    return loss, {"train/loss": Mean(total, num_tokens), "train/num_tokens": Sum(num_tokens)}
