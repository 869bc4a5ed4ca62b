"""Which row comes when: a pure function of the seed and a position.

Takes:  the number of rows, the run's seed, a position from 0 on.
Gives:  the row at that position; seeds that are the same in every process and on every machine.
Knows:  that a saved position is one whole number: nothing else has to be kept for a run to go on.
Keeps:  the order of the epoch asked for last.
"""

from __future__ import annotations

import hashlib

import numpy as np

SEED_BITS = 62  # sample i of a prompt is drawn with seed + i: one bit of room below a signed 64-bit number


def stable_seed(*parts: int | str) -> int:
    """A whole number in [0, 2**62) from its parts by BLAKE2b; Python's own hash() differs from process to process."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - SEED_BITS)


class EpochOrder:
    """The row at each position of an endless stream that goes over `num_rows` rows epoch by epoch.

    >>> order = EpochOrder(3, seed=0, shuffle=False)
    >>> [order.row(position) for position in range(5)]
    [0, 1, 2, 0, 1]
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._rows = np.arange(num_rows)

    def row(self, position: int) -> int:
        assert position >= 0, position
        epoch, place = divmod(position, self.num_rows)
        if self._shuffle and epoch != self._epoch:
            self._rows = np.random.default_rng(stable_seed(self._seed, "order", epoch)).permutation(self.num_rows)
            self._epoch = epoch
        return int(self._rows[place])
