"""What an evaluation's samples say of a policy beyond their mean reward.

Takes:  the rewards of each prompt's samples, their texts.
Gives:  `sample_metrics`: pass@k, maj@k, an interval of the mean; `interval` and `paired_interval` by the bootstrap.
Knows:  what is uncertain is the choice of prompts: they are what is drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flux_ray.records import ScoredGroup
from flux_ray.reward.answers import expression_in, parse_number, plain

RESAMPLES, SEED = 2000, 0
LOW, HIGH = 2.5, 97.5  # percentiles: an interval of 95 %

Texts = Sequence[str]


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """Probability that one of k samples at least is correct, of which so many were: unbiased (2107.03374, eq. 1).

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 0)
    (0.25, 0.5, 1.0, 0.0)
    """
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(texts: Texts) -> int | None:
    """The first sample whose answer is the one that most samples gave; of several the one that came first.

    A number is compared by its value, another answer as it is written. None where no text has an answer.

    >>> majority(["It is 8.", "so 7.0", "#### 7"]), majority(["1", "2"]), majority([""])
    (1, 0, None)
    """
    votes: dict[object, list[int]] = {}
    for i, text in enumerate(texts):
        answer = _answer(text)
        if answer is not None:
            votes.setdefault(answer, []).append(i)
    return max(votes.values(), key=len)[0] if votes else None


def _answer(text: str) -> object:
    number = parse_number(text)
    return number if number is not None else plain(expression_in(text)).strip() or None


def interval(values_P: np.ndarray) -> tuple[float, float]:
    """95 % of the mean over prompts, by drawing prompts again (percentile bootstrap).

    >>> low, high = interval(np.array([0.0, 1.0] * 50)); 0.38 < low < 0.42, 0.58 < high < 0.62
    (True, True)
    """
    drawn = np.random.default_rng(SEED).integers(0, len(values_P), (RESAMPLES, len(values_P)))
    low, high = np.percentile(values_P[drawn].mean(1), [LOW, HIGH])
    return float(low), float(high)


def paired_interval(before_P: np.ndarray, after_P: np.ndarray) -> tuple[float, float]:
    """95 % of the mean difference after - before of the same prompts, which are drawn together."""
    return interval(after_P - before_P)


def sample_metrics(
    groups: Sequence[ScoredGroup], texts: Sequence[Texts], prefix: str, *, correct_at: float,
) -> dict[str, float]:
    """task_mean_low and task_mean_high; pass@k and maj@k where prompts have several samples.

    A sample counts as correct whose task reward is at least `correct_at`; one without a reward does not. k: 1, 2, 4 and
    so on, and all samples. maj@k is of the first k.
    """
    means = [float(np.nanmean(group.task_rewards)) for group in groups if not np.isnan(group.task_rewards).all()]
    metrics: dict[str, float] = {}
    if len(means) > 1:
        low, high = interval(np.array(means))
        metrics |= {f"{prefix}/task_mean_low": low, f"{prefix}/task_mean_high": high}
    fewest = min((group.group_size for group in groups), default=0)
    for k in _counts(fewest) if fewest > 1 else ():
        correct = [group.task_rewards >= correct_at for group in groups]
        metrics[f"{prefix}/pass@{k}"] = float(np.mean([pass_at(k, len(c), int(c.sum())) for c in correct]))
        if k > 2:  # two votes decide nothing that one doesn't
            chosen = [majority(of_group[:k]) for of_group in texts]
            right = [i is not None and bool(c[i]) for i, c in zip(chosen, correct, strict=True)]
            metrics[f"{prefix}/maj@{k}"] = float(np.mean(right))
    return metrics


def _counts(num_samples: int) -> list[int]:
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    return powers if powers[-1] == num_samples else [*powers, num_samples]
