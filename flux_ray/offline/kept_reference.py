"""Keeps the reference's log-probs of preference pairs, which are asked once, for later epochs and for a resume.

Takes:  pairs; a function that asks the reference for those not known yet.
Gives:  `KeptReference.of(pairs)`: (chosen, rejected) sums of each.
Keeps:  two numbers for each pair, in this process and in reference.jsonl in the run's folder.
Knows:  a pair by a hash of its tokens and of the reference's path, so that another reference is asked anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from flux_ray.observability.run_folder import REFERENCE, RunFolder, read_lines
from flux_ray.protocols import LogprobSums
from flux_ray.records import PreferencePair

ASKED_AT_ONCE = 256  # pairs
DIGEST_BYTES = 16  # two pairs of one hash among 10^12: less likely than 10^-14


class KeptReference:
    """`ask`: pairs ► their sums, from the reference itself. `earlier`: the folder of the run that is resumed."""

    def __init__(
        self, folder: RunFolder, *, path: str, ask: Callable[[list[PreferencePair]], Awaitable[list[LogprobSums]]],
        earlier: Path | None = None,
    ) -> None:
        self._folder, self._path, self._ask = folder, path, ask
        self._known: dict[str, LogprobSums] = {}
        for place in {folder.path, earlier or folder.path}:
            for line in read_lines(place / REFERENCE):
                self._known[line["pair"]] = (line["chosen"], line["rejected"])

    async def of(self, pairs: Sequence[PreferencePair]) -> list[LogprobSums]:
        """(chosen, rejected) of each pair: log-probs of the responses, sums over their tokens."""
        digests = [_digest(self._path, pair) for pair in pairs]
        missing = {digest: pair for digest, pair in zip(digests, pairs, strict=True) if digest not in self._known}
        asked = list(missing)
        for start in range(0, len(asked), ASKED_AT_ONCE):  # so that what has come is kept if a later part fails
            some = asked[start : start + ASKED_AT_ONCE]
            for digest, sums in zip(some, await self._ask([missing[digest] for digest in some]), strict=True):
                self._known[digest] = sums
                self._folder.append(REFERENCE, {"pair": digest, "chosen": sums[0], "rejected": sums[1]})
        return [self._known[digest] for digest in digests]


def _digest(path: str, pair: PreferencePair) -> str:
    text = f"{path}\0{pair.prompt_length}\0{len(pair.chosen_ids)}\0".encode()
    ids = pair.chosen_ids.astype("<i4").tobytes() + pair.rejected_ids.astype("<i4").tobytes()
    return hashlib.blake2b(text + ids, digest_size=DIGEST_BYTES).hexdigest()
