"""The groups that are not trained on: how many, and why.

Takes:  each group's fate: kept, or dropped for a cause.
Gives:  the counts since the last step as metrics, the total for the checkpoint.
Never:  lets a run draw prompts without end: beyond filter.max_batches it stops it, naming the acceptance rate.
"""

from __future__ import annotations

from collections import Counter

from flux_ray.algo import filters
from flux_ray.cluster.group import ActorError
from flux_ray.config import Config

REWARD_FAILED = "reward_failed"  # a function raised or timed out, and reward.on_failure=drop
CAUSES = (*filters.CAUSES, REWARD_FAILED)


def refuse_unless_droppable(error: ActorError, config: Config) -> None:
    """The one rule of what a run survives: the failure of a reward, with reward.on_failure=drop. Raises all else."""
    if config.reward.on_failure != "drop" or error.role != "reward":
        raise error


class Drops:
    """Counts of one run.

    >>> drops = Drops(Config(), total=0)
    >>> drops.kept(); drops.dropped("same_reward"); drops.step_metrics()["filter/acceptance_rate"]
    0.5
    """

    def __init__(self, config: Config, *, total: int) -> None:
        self.total = total  # over the whole run, resumed ones included
        self._max_batches, self._batch = config.filter.max_batches, config.batch.prompts_per_step
        self._kept = 0
        self._causes: Counter[str] = Counter()

    def kept(self) -> None:
        self._kept += 1

    def dropped(self, cause: str) -> None:
        """RuntimeError where the step would draw more than filter.max_batches batches of prompts."""
        assert cause in CAUSES, cause
        self._causes[cause] += 1
        self.total += 1
        count = self._causes.total()
        if count > (self._max_batches - 1) * self._batch:
            causes = ", ".join(f"{cause} {n}" for cause, n in self._causes.items())
            raise RuntimeError(
                f"{count} of {count + self._kept} groups drawn since the last step were dropped ({causes}): acceptance "
                f"rate {self.acceptance_rate:.1%}; filter.max_batches={self._max_batches} of {self._batch} allows no "
                "more: raise it, or choose prompts or a reward that tell samples apart"
            )

    @property
    def acceptance_rate(self) -> float:
        drawn = self._kept + self._causes.total()
        return self._kept / drawn if drawn else 1.0

    def step_metrics(self) -> dict[str, float]:
        """What happened since the last step; the counting starts again."""
        metrics = {f"filter/dropped_{cause}": float(self._causes[cause]) for cause in CAUSES}
        metrics |= {"filter/acceptance_rate": self.acceptance_rate, "driver/groups_dropped": float(self.total)}
        self._kept, self._causes = 0, Counter()
        return metrics
