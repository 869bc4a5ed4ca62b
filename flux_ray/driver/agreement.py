"""Whether engines and trainer compute the same: the same tokens under the same weights, before anything is trained.

Takes:  prompts of the run; what an engine and the trainer made of some tokens (ComparedTokens).
Gives:  `first_prompts`, what to probe with; `disagreement` and `later`: what to tell the user, None where they agree.
Knows:  what float32 and bfloat16 may differ by, and where a model changes what it computes.
Never:  asks anybody: Ranks.probe does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flux_ray.config import RolloutConfig
from flux_ray.data import PromptSource
from flux_ray.messages import PROBE_TOKENS
from flux_ray.records import ComparedTokens, Prompt

MOST_TOKENS = 2048  # of the longest probe, so that a trainer on CPU is soon done; more where the model changes later
NUM_HALVINGS = 4  # other probes have half the longest one's tokens, a quarter …: they tell where a gap begins
NUM_LATER = 2  # samples of the one prompt that is probed after each step of an asynchronous run


@dataclass(frozen=True)
class Limits:
    """Of |log-prob of the trainer − of the engine|, in nats. A gap grows with position where its mean over the last
    quarter of the tokens is above `floor` and above `growth` times that over the first quarter."""

    largest: float
    mean: float
    floor: float
    growth: float


LIMITS = {
    "float32": Limits(largest=1e-3, mean=1e-3, floor=1e-4, growth=8.0),
    "bfloat16": Limits(largest=np.inf, mean=3e-2, floor=2e-2, growth=3.0),  # rounded alike: mean 1.3e-2, largest 6e-2
}


class Agreement:
    """`dtype`: of engines and trainer. `context`: tokens that a sequence of this run may have. `turns`: positions at
    which the model changes what it computes, such as the end of a sliding window."""

    def __init__(self, config: RolloutConfig, *, model: str, dtype: str, context: int, turns: Sequence[int] = ()
                 ) -> None:
        self._config, self._model, self._dtype, self._limits = config, model, dtype, LIMITS[dtype]
        self._context, self._turns = context, sorted(turn for turn in turns if turn < context)

    def first_prompts(self, prompts: PromptSource) -> list[Prompt]:
        """The run's own prompts as one text, cut at each of the lengths to probe; one sample each."""
        lengths = self.lengths(len(prompts.prompt(0).token_ids))
        texts: list[np.ndarray] = []
        while sum(map(len, texts)) < lengths[-1]:
            texts.append(prompts.prompt(len(texts)).token_ids)
        first, tokens = prompts.prompt(0), np.concatenate(texts)
        return [replace(first, token_ids=tokens[:length], num_samples=1, seed=first.seed + i)
                for i, length in enumerate(lengths)]

    def lengths(self, shortest: int) -> list[int]:
        """Lengths of the prompts to probe with, rising. The tokens sampled behind each are compared."""
        most = max([MOST_TOKENS, *(turn + PROBE_TOKENS for turn in self._turns)])
        longest = max(min(self._context - PROBE_TOKENS, most), 1)
        around = [turn + step for turn in self._turns for step in (-PROBE_TOKENS // 2, PROBE_TOKENS)]
        halves = [longest // 2**i for i in range(NUM_HALVINGS + 1)]
        return sorted({length for length in (shortest, *around, *halves) if 0 < length <= longest})

    def later_prompt(self, prompts: PromptSource) -> Prompt:
        """The prompt to probe with after a step: its batch may hold no sample of the present weights."""
        return replace(prompts.prompt(0), num_samples=NUM_LATER)

    def disagreement(self, compared: Sequence[ComparedTokens]) -> str | None:
        """What to tell the user of the first engine that disagrees with the trainer; None where all agree."""
        for engine in sorted({one.engine for one in compared}):
            told = self._of_one(ComparedTokens.joined([one for one in compared if one.engine == engine]))
            if told is not None:
                return told
        return None

    def _of_one(self, tokens: ComparedTokens) -> str | None:
        limits, gaps_N = self._limits, tokens.gaps_N
        quarter = -(-len(gaps_N) // 4)
        near, far = float(gaps_N[:quarter].mean()), float(gaps_N[-quarter:].mean())
        too_large = gaps_N.max() > limits.largest or gaps_N.mean() > limits.mean
        if not too_large and (far <= limits.floor or far <= limits.growth * near):
            return None
        how = "is too large" if too_large else "grows with position"
        i = int(np.argmax(gaps_N > (min(limits.largest, limits.mean) if too_large else limits.floor)))
        agreed = f"; up to there {gaps_N[:i].max():.0e} at most" if i else ""
        return (
            f"engine {tokens.engine} and the trainer give the same tokens other log-probs under the same weights: the "
            f"gap {how}, from position {tokens.positions_N[i]} on (there token {tokens.token_ids_N[i]} has "
            f"{tokens.engine_logprobs_N[i]:.4f} from the engine, {tokens.trainer_logprobs_N[i]:.4f} from the "
            f"trainer{agreed}); over {len(gaps_N)} tokens its mean is {gaps_N.mean():.1e}, its largest "
            f"{gaps_N.max():.1e}, and {self._right} is right. One of the two computes another model than "
            f"{self._model} is: take out what changes numbers in rollout.engine_args, look up the family "
            f"in docs/models.md, {self._try}or train all the same with weights.allow_logprob_gap=true"
        )

    @property
    def _right(self) -> str:
        limits = self._limits
        what = f"a largest of {limits.largest:.0e}" if np.isfinite(limits.largest) else f"a mean of {limits.mean:.0e}"
        return f"{what} in {self._dtype}"

    @property
    def _try(self) -> str:
        return "try model.dtype=float32, " if self._dtype != "float32" else ""

    def later(self, metrics: dict[str, float]) -> str | None:
        """What to tell the user where a step's metrics say that the two are too far apart; else None.

        None as well where sampling is truncated: the engine's log-probs are then those of another distribution.
        """
        rollout, limits = self._config, self._limits
        if rollout.top_p < 1 or rollout.top_k or rollout.min_p:
            return None
        mean, largest = (metrics.get(f"weights/logprob_gap_{which}", 0.0) for which in ("mean", "max"))
        if mean <= limits.mean and largest <= limits.largest:
            return None
        return (f"weights/logprob_gap_mean is {mean:.1e}, weights/logprob_gap_max {largest:.1e}; {self._right} is "
                "right. Engines sample from another distribution than the trainer learns on: ratios and KL are wrong "
                "by as much (docs/metrics.md, Whether engine and trainer agree)")
