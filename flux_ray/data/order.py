"""Which row comes when: a pure function of the seed and a position.

Takes:  the number of rows of each set, their weights and pass rates, the run's seed, a position from 0 on.
Gives:  the row at that position; seeds that are the same in every process and on every machine.
Knows:  that a saved position is one whole number: nothing else has to be kept for a run to go on.
Keeps:  the order of the epoch, and of the block, asked for last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

SEED_BITS = 62  # sample i of a prompt is drawn with seed + i: one bit of room below a signed 64-bit number
BLOCK = 1024  # draws over which sets have exactly their shares, to a draw

#: data.curriculum ► what it does with rows' pass rates.
EASY_FIRST, UNSURE_FIRST = "easy_first", "unsure_first"
UNKNOWN_RATE = 0.5  # of a row that nobody has sampled: it may be either


def stable_seed(*parts: int | str) -> int:
    """A whole number in [0, 2**62) from its parts by BLAKE2b; Python's own hash() differs from process to process."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - SEED_BITS)


class EpochOrder:
    """The row at each position of an endless stream that goes over `num_rows` rows epoch by epoch.

    name: of the set, where there are several. pass_rates: (num_rows,) in [0, 1], for a curriculum.

    >>> order = EpochOrder(3, seed=0, shuffle=False)
    >>> [order.row(position) for position in range(5)]
    [0, 1, 2, 0, 1]
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool, name: str = "",
                 curriculum: tuple[str, np.ndarray] | None = None) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self._parts: tuple[int | str, ...] = (seed, "order", name) if name else (seed, "order")
        self._shuffle, self._curriculum = shuffle, curriculum
        self._epoch = -1
        self._rows = np.arange(num_rows)

    def row(self, position: int) -> int:
        assert position >= 0, position
        epoch, place = divmod(position, self.num_rows)
        if (self._shuffle or self._curriculum) and epoch != self._epoch:
            self._rows = self._order_of(np.random.default_rng(stable_seed(*self._parts, epoch)))
            self._epoch = epoch
        return int(self._rows[place])

    def _order_of(self, rng: np.random.Generator) -> np.ndarray:
        if self._curriculum is None:
            return rng.permutation(self.num_rows)
        kind, pass_rates = self._curriculum
        return by_pass_rate(kind, pass_rates, rng.random(self.num_rows) if self._shuffle else None)


def by_pass_rate(kind: str, pass_rates: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """The rows (num_rows,) in the order of a curriculum; `draws`, uniform in [0, 1), decide where it doesn't.

    easy_first: from the highest pass rate to the lowest. unsure_first: by weight 4p(1-p), the variance of a reward
    that is 1 or 0, relative to its largest: without draws from the largest down, with them drawn without replacement
    by these weights (Efraimidis and Spirakis 2006: the largest u^(1/w) first); rows of weight 0 come last.

    >>> by_pass_rate(UNSURE_FIRST, np.array([1.0, 0.5, 0.9]), None).tolist()
    [1, 2, 0]
    """
    if kind == EASY_FIRST:
        return np.lexsort((np.zeros(len(pass_rates)) if draws is None else draws, -pass_rates))
    weights = 4 * pass_rates * (1 - pass_rates)
    if draws is None:
        return np.argsort(-weights, kind="stable")
    with np.errstate(divide="ignore"):
        keys = np.where(weights > 0, np.log(draws) / weights, -np.inf)
    return np.lexsort((draws, -keys))


class MixedOrder:
    """The row at each position of a stream over several sets, whose rows lie one set after another.

    Of every 1,024 draws each set has its share by weight, at least one; within a set it goes epoch by epoch.

    >>> order = MixedOrder([EpochOrder(n, seed=0, shuffle=False) for n in (2, 5)], [1, 1], seed=0, shuffle=False)
    >>> [order.row(position) for position in range(6)]
    [0, 2, 1, 3, 0, 4]
    """

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float], *, seed: int, shuffle: bool) -> None:
        assert len(orders) == len(weights) <= BLOCK
        self._orders, self._seed, self._shuffle = orders, seed, shuffle
        self._starts = np.cumsum([0, *(order.num_rows for order in orders)])
        self.num_rows = int(self._starts[-1])
        self._counts = shares(weights, BLOCK)
        self._block = -1
        self._sets, self._places = self._spread(None)

    def row(self, position: int) -> int:
        assert position >= 0, position
        if len(self._orders) == 1:
            return self._orders[0].row(position)
        block, place = divmod(position, BLOCK)
        if self._shuffle and block != self._block:
            rng = np.random.default_rng(stable_seed(self._seed, "mix", block))
            self._sets, self._places = self._spread(rng)
            self._block = block
        chosen = int(self._sets[place])
        within = block * int(self._counts[chosen]) + int(self._places[place])
        return int(self._starts[chosen]) + self._orders[chosen].row(within)

    def _spread(self, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) each: the set of each draw of a block, and how many of that set come before it in the block."""
        sets = np.repeat(np.arange(len(self._counts)), self._counts)
        places = np.concatenate([np.arange(count) for count in self._counts])
        if rng is None:   # evenly
            chosen = np.argsort((places + 0.5) / self._counts[sets], kind="stable")
            return sets[chosen], places[chosen]
        sets = rng.permutation(sets)
        before = np.zeros(BLOCK, np.int64)
        for one, count in enumerate(self._counts):
            before[sets == one] = np.arange(count)
        return sets, before


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, at least 1 each, nearest to the weights' shares (largest remainders).

    >>> shares([3, 1, 0.0001], 8).tolist()
    [5, 2, 1]
    """
    exact = np.array(weights, np.float64) / np.sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(total - counts.sum()):
        counts[np.argmax(exact - counts)] += 1
    for _ in range(counts.sum() - total):   # those that were lifted to 1 take from the largest
        counts[np.argmax(counts)] -= 1
    return counts
