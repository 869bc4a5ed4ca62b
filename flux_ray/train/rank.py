"""One rank of a group that trains one model: a policy, a critic or a reward model.

Takes:  Config, a place in the group, a function that loads its model.
Gives:  an Engine around the model; whole weights; checkpoints and models on disk.
Knows:  what every kind of training shares; the classes that inherit know the objective.
Never:  gives away weights that are not finite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from flux_ray import run_dir
from flux_ray.config import Config, PolicyGradientConfig, PolicyModelConfig
from flux_ray.errors import UserError
from flux_ray.model import (
    PackedModel,
    ScoreModel,
    adapt,
    load_policy,
    load_score,
    load_tokenizer,
    resolve_dtype,
    save_model,
)
from flux_ray.model.policy import PolicyModel
from flux_ray.model.routing import Routing, routers_of
from flux_ray.model.save import UNWRITTEN, why_unwritten
from flux_ray.records import ScoredGroup
from flux_ray.train import checkpoint, full_weights, setup, skipped
from flux_ray.train.engine import Engine

SAVED_AT_ONCE_BYTES = 64 * 2**20  # whole weights that are gathered together while a model is saved
Load = Callable[[Config, torch.dtype], PackedModel]


class Rank:
    """All methods but `weight_metadata` and `finish_checkpoint` are collective: every rank calls them, in the same
    order."""

    trained = "trainer"  # what the group is, in the names of files

    def __init__(self, config: Config, *, load: Load, **place: Unpack[setup.Place]) -> None:
        if config.model.path is None:
            raise UserError("model.path: no model given")
        if config.run_dir is not None:
            run_dir.check_seen(config.run_dir)
        rank, device = place["rank"], place["device"]
        deepspeed = setup.join(config.train, **place)
        torch.manual_seed(config.seed + rank)
        self.config = config
        self.step = 0
        self.kl_coef = 0.0  # of the next step, where there is a KL in the reward
        dtype = resolve_dtype(config.model.dtype, device)
        self.model = load(config, dtype)
        if config.train.lora.rank:
            self.model.adapter = adapt(self.model.hf, config.train.lora, seed=config.seed,
                                       train_head=isinstance(self.model, ScoreModel))
        if isinstance(self.model, PolicyModel) and routers_of(self.model.hf):
            replays = isinstance(config, PolicyGradientConfig) and config.algo.router_replay
            self.model.routing = Routing(self.model.hf, replays=replays)
            if config.train.freeze_routers:
                self.model.routing.freeze()
        self.engine = Engine(self.model, config.train, deepspeed=deepspeed, dtype=dtype, device=device)
        self._writing: Future[None] | None = None  # of the last checkpoint

    def weight_metadata(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        """(name, type, shape) of every weight that `iter_weights` gives, in its order."""
        return full_weights.metadata(self.model)

    def iter_weights(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Whole weights by checkpoint name, bucket by bucket; a tensor is valid until the next is asked for."""
        return full_weights.iter_weights(self.model, bucket_bytes)

    def check_weights(self) -> None:
        """RuntimeError on all ranks alike, of one line, where a trained weight isn't finite."""
        # Each rank looks at what it holds: all of the weights, or its shares of them.
        first = full_weights.first_not_finite(self.model)
        names = [name for name, _ in full_weights.parameters(self.model)]
        of_all = len(names) - self.engine.max(0 if first is None else len(names) - first)
        if of_all < len(names):
            raise RuntimeError(f"after {self.engine.num_updates} updates the weight {names[of_all]} has values that "
                               "are not finite: it is neither published nor saved")

    def keep_skipped(self, step: int, scores: Sequence[ScoredGroup] = ()) -> None:
        """On disk, what the updates were to be made from that the step has left out; `scores`: of its groups."""
        left_out, self.engine.skipped = self.engine.skipped, []
        if left_out and self.config.run_dir is not None:
            skipped.keep(Path(self.config.run_dir, run_dir.BAD_BATCHES), left_out, step=step, name=self.trained,
                         rank=self.engine.rank, scores=scores)

    def save_checkpoint(self, folder: str | Path, background: str = "never") -> None:
        """All that the next step depends on, in one folder, whole or not at all: once `finish_checkpoint` says so.

        The next step may begin before. `background`: as `checkpoint.save` takes it. Raises as `check_weights`.
        """
        self.check_weights()
        self._writing = checkpoint.save(self.engine, folder, step=self.step, kl_coef=self.kl_coef,
                                        background=background)

    async def finish_checkpoint(self) -> str | None:
        """Waits until the checkpoint that was begun is on disk; why it can't be, where the disk is full, say."""
        assert self._writing is not None, "save_checkpoint comes first"
        try:
            await asyncio.shield(asyncio.wrap_future(self._writing))
        except UNWRITTEN as error:
            return why_unwritten(error)
        return None

    def load_checkpoint(self, folder: str | Path) -> None:
        """Go on where the checkpoint was written, with any number of ranks and any ZeRO stage."""
        self.step, kl_coef = checkpoint.load(self.engine, folder)
        if self.adapts_kl:  # a fixed coefficient is the config's, which a resume may change
            self.kl_coef = kl_coef

    @property
    def adapts_kl(self) -> bool:
        return False

    def save_model(self, folder: str | Path) -> None:
        """Write the model in Hugging Face layout, its adapter merged, and beside it the adapter alone, as peft has it.

        Rank 0 writes. Raises as `check_weights`.
        """
        self.check_weights()
        weights = self.iter_weights(SAVED_AT_ONCE_BYTES)
        if self.engine.rank == 0:
            write_model(self.model, self.config, folder, weights)
        else:
            for _ in weights:
                pass
        self._save_adapter(Path(folder))
        dist.barrier()

    def _save_adapter(self, model_folder: Path) -> None:
        """The folder is `adapter` beside `model`, NAME_adapter beside any other NAME."""
        if self.model.adapter is None:
            return
        trained = full_weights.iter_trained(self.model)
        if self.engine.rank == 0:
            name = "adapter" if model_folder.name == "model" else f"{model_folder.name}_adapter"
            task = "SEQ_CLS" if isinstance(self.model, ScoreModel) else "CAUSAL_LM"
            self.model.adapter.save(model_folder.with_name(name), trained, base=str(self.config.model.path), task=task)
        else:
            for _ in trained:
                pass

    def close(self) -> None:
        """Leave the group."""
        setup.leave()


def write_model(model: PackedModel, config: Config, folder: str | Path, weights: Iterator[tuple[str, Tensor]]) -> None:
    """A model and its tokenizer. UserError where it can't be written: a run ends by it, with the ranks that wait."""
    tokenizer = load_tokenizer(config.model.tokenizer or str(config.model.path))
    if isinstance(model, ScoreModel):
        tokenizer = model.pad_alike(tokenizer)
    try:
        save_model(folder, weights, hf_config=model.original_config, tokenizer=tokenizer,
                   generation_config=getattr(model.hf, "generation_config", None))
    except UNWRITTEN as error:
        raise UserError(f"the model can't be written to {folder}: {why_unwritten(error)} (flux-ray checkpoint export "
                        "makes one from a checkpoint)") from error


def trained_policy(config: Config, dtype: torch.dtype) -> PackedModel:
    """The policy of model.path."""
    assert isinstance(config.model, PolicyModelConfig), config.algo.name
    return load_policy(
        str(config.model.path), dtype=dtype, attention=config.model.attention, layout=config.model.layout,
        chunk_tokens=config.model.logprob_chunk_tokens, gradient_checkpointing=config.train.gradient_checkpointing,
    )


def trained_score(config: Config, dtype: torch.dtype) -> PackedModel:
    """A score model from model.path, which may be one already; a policy gets a new head."""
    return load_score(
        str(config.model.path), dtype=dtype, attention=config.model.attention, layout=config.model.layout,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
