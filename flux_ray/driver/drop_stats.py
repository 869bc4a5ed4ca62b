"""Counts the groups that are not trained on, by cause.

Takes:  each group's fate: kept, or dropped for a cause; its sampled tokens.
Gives:  the counts since the last step as metrics, the total for the checkpoint; METRICS.
Knows:  groups dropped for their reward may be longer or shorter than others: lengths of all groups are counted.
Never:  lets a run draw prompts without end: beyond filter.max_batches it stops the run, naming the acceptance rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flux_ray.algo import filters
from flux_ray.config import PolicyGradientConfig
from flux_ray.observability.described import Described

CAUSES = (*filters.CAUSES, filters.REWARD_FAILED, filters.ROLLOUT_FAILED)
KEPT = "trained"  # the group passed: it is in this step's batch, or in a later one's
SURPLUS = "surplus"  # it passed, and the batch was full without it

DRAWN = "groups drawn since the last step"

METRICS = (
    Described("filter/acceptance_rate", "share that passed the filter", "1", DRAWN, "well above 0",
              "as `reward/same_frac`. A run stops after `filter.max_batches` batches of one step"),
    Described("filter/dropped_CAUSE", "number that was dropped for that cause: `same_reward`, `unscored`, "
              "`reward_failed`, `rollout_failed`", "group", DRAWN, "",
              "`same_reward`: as above. `unscored`: the reward had nothing to say. `reward_failed`: `run.log` says "
              "what it raised. `rollout_failed`: the rollout function ended or blocked its process twice"),
    Described("filter/rate_CAUSE", "share that was dropped for that cause", "1", DRAWN),
    Described("filter/length_issued", "mean sampled tokens of a sample", "token", "all that were finished"),
    Described("filter/length_trained", "mean sampled tokens of a sample", "token",
              "those that passed, some of which are trained on in a later step with `max_staleness` above 0",
              "near `filter/length_issued`",
              "far from it: what is dropped is longer or shorter. The policy learns other lengths than it writes"),
    Described("filter/length_CAUSE", "mean sampled tokens of a sample", "token", "those dropped for that cause"),
    Described("filter/surplus", "over-sampled prompts that a full batch had no need of, running or finished. They "
              "start again", "group", DRAWN, "", "large: a smaller `filter.oversample`"),
    Described("filter/surplus_accepted", "groups among them that had passed the filter", "group", DRAWN, "",
              "as `filter/surplus`"),
    Described("filter/length_surplus", "mean sampled tokens of a sample", "token", "those among them"),
    Described("driver/groups_dropped", "groups dropped in the whole run, before a resume too. A spare that starts "
              "again and is dropped again counts twice", "group", "the run", "",
              "grows fast: as `filter/acceptance_rate`"),
)


class DropStats:
    """Counts of one run. `num_tokens` are a group's sampled tokens.

    >>> drops = DropStats(PolicyGradientConfig(), total=0)
    >>> drops.kept(num_tokens=40); drops.dropped("same_reward", num_tokens=8)
    >>> metrics = drops.step_metrics()
    >>> metrics["filter/acceptance_rate"], metrics["filter/length_issued"], metrics["filter/length_same_reward"]
    (0.5, 6.0, 2.0)
    """

    def __init__(self, config: PolicyGradientConfig, *, total: int) -> None:
        self.total = total  # over the whole run, resumed ones included
        self._max_batches, self._batch = config.filter.max_batches, config.batch.prompts_per_step
        self._group_size = config.rollout.group_size
        self._forget()

    def _forget(self) -> None:
        self._groups: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()
        self._surplus = self._spent = 0

    def _count(self, fate: str, num_tokens: int, sign: int = 1) -> None:
        self._groups[fate] += sign
        self._tokens[fate] += sign * num_tokens
        self._samples[fate] += sign * self._group_size

    def kept(self, *, num_tokens: int, sign: int = 1) -> None:
        """`sign` -1 takes one back: the group starts again."""
        self._count(KEPT, num_tokens, sign)

    def surplus(self, count: int, finished: Sequence[int] = ()) -> None:
        """Over-sampled prompts that the full batch doesn't need; they start again, so that none is lost.

        `finished`: the tokens of those that were counted as kept.
        """
        self._surplus += count
        for num_tokens in finished:
            self._count(KEPT, num_tokens, -1)
            self._count(SURPLUS, num_tokens)

    def dropped(self, cause: str, *, num_tokens: int, spent: int = 1) -> None:
        """`spent`: how many dropped groups had their turn by now; a spare's turn may never come.

        RuntimeError where the step would need more than filter.max_batches batches of prompts.
        """
        assert cause in CAUSES, cause
        self._count(cause, num_tokens)
        self.total += 1
        self._spent += spent
        count = self._groups.total() - self._accepted
        # With max_staleness > 0 groups of several batches run at once: groups kept for later batches count too.
        if self._spent > (self._max_batches - 1) * max(self._batch, self._groups[KEPT]):
            causes = ", ".join(f"{cause} {n}" for cause, n in self._groups.items() if cause in CAUSES)
            raise RuntimeError(
                f"{count} of {self._groups.total()} groups drawn since the last step were dropped ({causes}): "
                f"acceptance rate {self.acceptance_rate:.1%}; filter.max_batches={self._max_batches} of {self._batch} "
                "allows no more: raise it, or choose prompts or a reward that tell samples apart"
            )

    @property
    def _accepted(self) -> int:
        return self._groups[KEPT] + self._groups[SURPLUS]

    @property
    def acceptance_rate(self) -> float:
        drawn = self._groups.total()
        return self._accepted / drawn if drawn else 1.0

    def step_metrics(self) -> dict[str, float]:
        """The counts since the last step; counting starts again.

        filter/dropped_CAUSE and filter/rate_CAUSE (share of the groups drawn), for each cause;
        filter/length_*: mean sampled tokens of a sample, over all groups and by fate (absent where there was none).
        """
        drawn = max(self._groups.total(), 1)
        metrics = {f"filter/dropped_{cause}": float(self._groups[cause]) for cause in CAUSES}
        metrics |= {f"filter/rate_{cause}": self._groups[cause] / drawn for cause in CAUSES}
        metrics |= {"filter/acceptance_rate": self.acceptance_rate, "driver/groups_dropped": float(self.total)}
        metrics |= {"filter/surplus": float(self._surplus), "filter/surplus_accepted": float(self._groups[SURPLUS])}
        metrics |= {f"filter/length_{fate}": self._tokens[fate] / n for fate, n in self._samples.items() if n}
        if samples := self._samples.total():
            metrics["filter/length_issued"] = self._tokens.total() / samples
        self._forget()
        return metrics
