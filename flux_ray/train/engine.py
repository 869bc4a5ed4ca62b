"""One rank of the training engine: forward, backward, one optimizer update, in step with the other ranks.

Takes:  packed micro-batches and an objective (the model's output ► loss, metrics).
Gives:  `update` (gradients of the sum over all ranks' micro-batches, then AdamW), `accumulate` (their gradients
        alone, before an update), `forward`, sums over ranks.
Knows:  DeepSpeed's averaging (undone: the step's loss is a sum), ZeRO's lockstep (every rank runs equally many
        micro-batches, some of them without weight), the learning rate of each update.
Never:  trains on a loss or gradient that isn't finite: all ranks leave the update out, and keep what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypedDict, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from flux_ray.batch import MicroBatch, without_weight
from flux_ray.config import TrainConfig
from flux_ray.model import PackedModel, ScoreModel
from flux_ray.model.routing import load_metrics
from flux_ray.observability.described import Described, renamed
from flux_ray.observability.metrics import Max, Mean, Metric, merge
from flux_ray.train import setup
from flux_ray.train.skipped import Skipped, not_finite

T = TypeVar("T")

#: (number of the micro-batch, the micro-batch, the model's output: log-probs (S,) and entropy (S,), or scores (S,))
#: ► loss (a scalar), metrics
Objective = Callable[..., tuple[Tensor, dict[str, Metric]]]

#: Of the policy's updates, or of those of the one model that is trained.
METRICS = (
    Described("train/grad_norm", "norm of the gradient before clipping, mean over updates", "", "", "above 0",
              "peaks far above `train.max_grad_norm` again and again: a lower learning rate, or more prompts a step. "
              "0: there is nothing to learn"),
    Described("train/learning_rate", "learning rate, mean over updates", "", "", "",
              "not what you gave: `train.warmup_steps` and `train.schedule` count optimizer updates"),
    Described("train/num_micro_batches", "micro-batches of an update on each rank; the most of any update",
              "micro-batch", "", "",
              "many on a GPU: raise `batch.max_tokens_per_micro_batch` as far as memory allows"),
    Described("train/padding_frac", "share of no use: padding, and micro-batches that only keep ranks in step", "1",
              "forwarded tokens", "below 0.1",
              "a larger token budget, `model.layout=varlen` on a GPU, prompts that divide evenly over ranks"),
    Described("train/skipped", "share that all ranks left out, because a log-prob, a loss or the gradient was nan or "
              "infinite. Weights, AdamW's moments and the schedule stayed as they were, and nothing else is measured "
              "of such an update. The unchanged weights are published as usual, and the groups count as trained", "1",
              "updates of the step", "0",
              "the warning names the number and the file of the batch. [What to "
              "do](troubleshooting.md#while-it-runs)"),
)
#: The same of the critic's.
OF_CRITIC = tuple(renamed(one, one.name.replace("train/", "critic/"), otherwise=f"as `{one.name}`") for one in METRICS)


class Asked(TypedDict, total=False):
    """What the model's forward is asked for."""

    temperature: float  # of a policy, with the next
    with_entropy: bool
    at: str  # of a score model: the tokens that are scored


class Engine:
    """A policy or a score model under DeepSpeed. Every method is a collective: all ranks call it, in the same order."""

    def __init__(
        self, model: PackedModel, config: TrainConfig, *, deepspeed: ModuleType, dtype: torch.dtype, device: str,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.zero_stage = setup.zero_stage(config, dtype)
        self.num_updates = 0
        self.skipped: list[Skipped] = []  # updates that were left out; whoever keeps them on disk takes them away
        self._begin_update()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate,
            betas=(config.adam_betas[0], config.adam_betas[1]), eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=True,
        )
        settings = setup.deepspeed_config(config, dtype)
        if self.zero_stage == 3:
            _shard(model, deepspeed, settings, dtype=dtype, device=device)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    # -- collectives ---------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over ranks."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def max(self, value: int) -> int:
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def everyone(self, mine: T) -> tuple[list[T], int]:
        """Every rank's value, in the order of the ranks, and the place of this one."""
        parts = [mine] * self.world_size
        dist.all_gather_object(parts, mine)
        return parts, self.rank

    def merge(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Every rank's metrics, added up; the same on all of them."""
        parts, _ = self.everyone(metrics)
        return merge(parts)

    # -- forward and backward ------------------------------------------------------------------------------------

    def forward(self, micro_batches: Sequence[MicroBatch], **asked: Unpack[Asked]) -> list[Tensor]:
        """(S,) log-probs or scores of each of this rank's micro-batches, without gradients."""
        results = []
        self.deepspeed.eval()
        with torch.no_grad():
            for micro_batch in self._in_lockstep(micro_batches):
                values_S, *_ = _given(self.deepspeed(micro_batch.to(self.device), **asked))
                results.append(values_S)
        self.deepspeed.train()
        return results[: len(micro_batches)]

    def update(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, *, total_updates: int, divisor: float = 1.0,
        **asked: Unpack[Asked],
    ) -> dict[str, Metric]:
        """One optimizer update on the sum of the objective over all ranks' micro-batches, divided by `divisor`.

        Micro-batches that were accumulated before count too. Gives this rank's metrics of these micro-batches. Does
        nothing, and measures nothing, where no rank has a micro-batch. Where a loss or the gradient isn't finite, all
        ranks leave the update out alike: weights, moments and schedule stay, and train/skipped is all that is measured.
        """
        metrics = self.accumulate(micro_batches, objective, last=True, **asked)
        num_micro_batches, taken, why = self._num_accumulated, self._taken, self._why
        loads = self._load_metrics() if num_micro_batches else {}
        self._begin_update()
        if not num_micro_batches:
            return {}
        why = self._first(why)
        rate = setup.learning_rate(self.config, self.num_updates, total_updates)
        norm = self._optimizer_step(rate, divisor)
        if not math.isfinite(norm) or norm < 0:  # ZeRO says -1 for a norm that overflowed
            self.skipped.append(Skipped(self.num_updates, why or "the gradient's norm", taken))
            return {"train/skipped": Mean(1.0)}
        assert why is None, f"training update {self.num_updates} was made, though this is not finite: {why}"
        self.num_updates += 1
        return metrics | loads | {"train/grad_norm": Mean(norm), "train/learning_rate": Mean(rate),
                          "train/num_micro_batches": Max(num_micro_batches), "train/skipped": Mean(0.0)}

    def _begin_update(self) -> None:
        self._num_accumulated = 0  # micro-batches since the last update
        self._taken: list[MicroBatch] = []  # this rank's own of them
        self._why: str | None = None  # what isn't finite in them
        self._choices: Tensor | int = 0  # (layers, E) of a mixture's experts in them

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], objective: Objective, *, last: bool = False,
        **asked: Unpack[Asked],
    ) -> dict[str, Metric]:
        """Forward and backward alone: gradients add up until `update`, which says `last`. Gives this rank's metrics."""
        in_step = self._in_lockstep(micro_batches, at_least=int(last and self._num_accumulated > 0))
        metrics: list[dict[str, Metric]] = []
        self.deepspeed.train()
        for i, micro_batch in enumerate(in_step):
            moved = micro_batch.to(self.device)
            given = _given(self.deepspeed(moved, **asked))
            # It adds nothing, but makes backward take the same way on every rank: ZeRO-3 gathers as it goes.
            loss = 0.0 * sum(values_S.sum() for values_S in given if values_S is not None)
            if i < len(micro_batches) and bool(micro_batch.loss_mask_S.any()):
                wanted, measured = objective(i, moved, *given)
                loss = loss + wanted
                metrics.append(measured)
                loss = loss + self._balance(moved, metrics)
            if not bool(torch.isfinite(loss)):
                output = "scores" if isinstance(self.model, ScoreModel) else "log-probs"
                self._why = self._why or not_finite(moved, given, output=output)
                # The gradient too must be of no use: its norm, which all ranks share, then leaves the update out.
                loss = loss * math.nan
            self.deepspeed.set_gradient_accumulation_boundary(last and i == len(in_step) - 1)
            # DeepSpeed averages gradients over ranks; the step's loss is a sum over them.
            self.deepspeed.backward(loss * self.world_size)
        self._num_accumulated += len(in_step)
        self._taken += micro_batches
        return merge([*metrics, {"train/padding_frac": self._unused(in_step, of_use=micro_batches)}])

    def _balance(self, micro_batch: MicroBatch, metrics: list[dict[str, Metric]]) -> Tensor | float:
        """The weighted loss that keeps a mixture's routers even, of the last forward; what it measures is added."""
        routing, coef = self.model.routing, self.config.router_balance_coef
        if routing is None:
            return 0.0
        num_tokens = micro_batch.num_tokens
        self._choices = routing.counts_LE + self._choices
        metrics.append({"router/balance": Mean(float(routing.balance.detach()) * num_tokens, num_tokens)})
        return coef * micro_batch.loss_weights_S.sum() * routing.balance if coef else 0.0

    def _load_metrics(self) -> dict[str, Metric]:
        """Of all ranks' micro-batches since the last update. Collective, where there are routers."""
        if self.model.routing is None:
            return {}
        choices_LE = self.sum(self._choices + torch.zeros_like(self.model.routing.counts_LE))
        return {name: Mean(load) for name, load in load_metrics(choices_LE).items()}

    def _in_lockstep(self, micro_batches: Sequence[MicroBatch], at_least: int = 0) -> list[MicroBatch]:
        """As many micro-batches as the rank with the most has: those added have no weight."""
        missing = max(self.max(len(micro_batches)), at_least) - len(micro_batches)
        return [*micro_batches, *[without_weight()] * missing]

    def _unused(self, in_step: Sequence[MicroBatch], *, of_use: Sequence[MicroBatch]) -> Mean:
        """Share of the tokens forwarded that are padding, or that keep this rank in step with the others."""
        padded = self.model.layout == "padded"
        whole = sum(m.num_padded_tokens if padded else m.num_tokens for m in in_step)
        return Mean(whole - sum(m.num_tokens for m in of_use), whole)

    # -- the optimizer -------------------------------------------------------------------------------------------

    def _first(self, why: str | None) -> str | None:
        """What isn't finite, and on which rank; None where everything is. Collective."""
        if not self.max(int(why is not None)):
            return None
        every, _ = self.everyone(why)
        return next(f"{of_rank} on rank {rank}" for rank, of_rank in enumerate(every) if of_rank is not None)

    def _optimizer_step(self, rate: float, divisor: float) -> float:
        """AdamW on the gradients over `divisor`, clipped; nothing moves where their norm isn't finite.

        Gives the norm before clipping. No gradient is left.
        """
        optimizer = self.deepspeed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        if self.zero_stage == 0:
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            torch._foreach_div_([p.grad for p in parameters], divisor)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf))
            if not math.isfinite(norm):
                self.model.zero_grad(set_to_none=True)  # without gradients AdamW leaves everything as it is
            self.deepspeed.step()
            return norm
        # ZeRO takes the norm inside its step, and skips the update where it isn't finite.
        sums = getattr(optimizer, "fp32_groups_gradients_flat", None)  # bf16's optimizer under stage 1 has them
        if sums is not None:
            torch._foreach_div_(sums, divisor)
            self.deepspeed.step()
        else:
            optimizer.loss_scale = divisor  # the other optimizers divide by it
            self.deepspeed.step()
            optimizer.loss_scale = 1.0
        return float(self.deepspeed.get_global_grad_norm())


def _shard(
    model: PackedModel, deepspeed: ModuleType, settings: dict[str, object], *, dtype: torch.dtype, device: str,
) -> None:
    """Move this rank's share of every parameter to its device, one parameter after the other.

    `deepspeed.initialize` would move the whole model there first, and one larger than a GPU could not be trained.
    """
    deepspeed.zero.Init(module=model, dtype=dtype, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _given(output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
