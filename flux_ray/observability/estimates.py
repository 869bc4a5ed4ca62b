"""What an evaluation's samples say of the model, and how sure that is.

Takes:  per prompt: rewards of its samples, the answers that they give.
Gives:  `pass_at_k`, `majority_at_k`; `interval` of a mean over prompts, of a paired difference too.
Knows:  prompts are what is drawn: all samples of a prompt go in and out of a resample together.
Never:  gives another number for the same input: what is drawn is drawn from a fixed seed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95  # of the intervals
RESAMPLES = 2000   # of a bootstrap: the ends of an interval then vary by some 3 % of its width
MAX_SUBSETS = 500  # of a prompt's samples, for maj@k: all where there are no more, else so many drawn
CHUNK = 2_000_000  # numbers drawn at once: 16 MB


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, of which `num_right` of `num_samples` were.

    1 - C(n-c, k) / C(n, k): unbiased (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), round(pass_at_k(4, 2, 2), 4)
    (0.25, 1.0, 0.8333)
    """
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples, (num_samples, num_right, k)
    # One less a product of k factors: no factorial of a large number.
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def majority_at_k(answers: Sequence[str], right: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer of k samples is right (self-consistency: Wang et al. 2023).

    Mean over subsets of k samples. Among answers that are equally frequent one is drawn: each counts its share. An
    answer that was scored now right, now wrong counts the share of its samples in the subset that are right.

    >>> majority_at_k(["4", "4", "5"], [True, True, False], 3), majority_at_k(["4", "5"], [True, False], 2)
    (1.0, 0.5)
    """
    assert len(answers) == len(right) and 1 <= k <= len(answers), (len(answers), len(right), k)
    voted = [_of_the_most(answers, right, subset) for subset in _subsets(len(answers), k)]
    return sum(voted) / len(voted)


def _of_the_most(answers: Sequence[str], right: Sequence[bool], subset: Sequence[int]) -> float:
    counts = Counter(answers[i] for i in subset)
    hits = Counter(answers[i] for i in subset if right[i])
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    return sum(hits[answer] / most for answer in winners) / len(winners)


def _subsets(n: int, k: int) -> Iterator[Sequence[int]]:
    if math.comb(n, k) <= MAX_SUBSETS:
        yield from itertools.combinations(range(n), k)
        return
    random = np.random.default_rng(0)
    for _ in range(MAX_SUBSETS):
        yield random.choice(n, k, replace=False).tolist()


def ks(num_samples: int) -> list[int]:
    """The k that are told of: powers of two below the number of samples, and that number.

    >>> ks(1), ks(6), ks(8)
    ([1], [1, 2, 4, 6], [1, 2, 4, 8])
    """
    return [*itertools.takewhile(lambda k: k < num_samples, (2**i for i in itertools.count())), num_samples]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of these values, one a prompt: percentile bootstrap (Efron 1979).

    The same of paired differences, one a prompt, is the paired bootstrap. A single value is its own interval.
    """
    values = np.asarray(values, np.float64)
    assert values.ndim == 1 and len(values), values.shape
    random = np.random.default_rng(0)
    rows = max(1, CHUNK // len(values))
    means = np.concatenate([
        values[random.integers(len(values), size=(min(rows, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
