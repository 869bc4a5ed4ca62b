"""Has engines and trainer compute the same tokens: before the first step, and beside those of an asynchronous run.

Takes:  the run's prompts; what Ranks.probe gives of them.
Gives:  `first`, `after_publish`, `watch`: an error or a warning where the two disagree.
Knows:  when to ask. Agreement says what may be asked with, and what the answers mean.
"""

from __future__ import annotations

import numpy as np

from flux_ray.config import PolicyGradientConfig
from flux_ray.data import PromptSource
from flux_ray.driver.agreement import Agreement
from flux_ray.driver.ranks import Ranks
from flux_ray.driver.stages import Stages
from flux_ray.errors import UserError


class Probing:
    def __init__(self, config: PolicyGradientConfig, agreement: Agreement, *, stages: Stages, ranks: Ranks,
                 prompts: PromptSource) -> None:
        self._config, self._agreement = config, agreement
        self._stages, self._ranks, self._prompts = stages, ranks, prompts
        self._disagreed = False  # after the last step

    async def first(self) -> None:
        """Right after the first publish. UserError where engines and trainer disagree, unless the config allows it."""
        prompts = self._agreement.first_prompts(self._prompts)
        while (compared := await self._ranks.probe(prompts, self._stages.workers)) is None:
            await self._stages.workers.all_serve()
        told = self._agreement.disagreement(compared)
        if told is not None and not self._config.weights.allow_logprob_gap:
            raise UserError(told)
        if told is not None:
            self._stages.warn("logprob_gap", told)

    async def after_publish(self) -> dict[str, float]:
        """weights/logprob_gap_* of a few tokens under the new weights.

        For asynchronous runs, whose batches may hold no sample of the present version. Nothing for synchronous ones,
        nor where a rollout worker dies meanwhile: the next step looks again.
        """
        if not self._config.driver.max_staleness:
            return {}
        compared = await self._ranks.probe([self._agreement.later_prompt(self._prompts)], self._stages.workers)
        if not compared:
            return {}
        gaps_N = np.concatenate([one.gaps_N for one in compared])
        return {"weights/logprob_gap_mean": float(gaps_N.mean()), "weights/logprob_gap_max": float(gaps_N.max())}

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Warn where a step's metrics say that the two disagree, and did not at the step before."""
        told = self._agreement.later(metrics)
        if told is not None and not self._disagreed:
            self._stages.warn("logprob_gap", f"step {step + 1}: {told}")
        self._disagreed = told is not None
