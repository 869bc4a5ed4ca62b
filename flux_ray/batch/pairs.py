"""From preference pairs to samples side by side.

Takes:  PreferencePairs.
Gives:  `pair_samples`: chosen, rejected, chosen, rejected …, for `pack(..., unit=2)`.
Knows:  a policy is asked for the log-probs of the responses, a reward model for one score at each one's end.
Never:  weighs a pair: it counts 1/N, and only the caller knows N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flux_ray.records import PreferencePair, Sample


def pair_samples(
    pairs: Sequence[PreferencePair], *, scored_at: Callable[[np.ndarray], int] | None = None,
) -> list[Sample]:
    """Two Samples a pair. The loss mask: all tokens of the response, or the one at `scored_at(token_ids)` alone; the
    loss weights are 0."""
    samples = []
    for pair in pairs:
        for token_ids in (pair.chosen_ids, pair.rejected_ids):
            places = np.arange(len(token_ids))
            loss_mask = places >= pair.prompt_length if scored_at is None else places == scored_at(token_ids)
            samples.append(Sample(token_ids, loss_mask, np.zeros(len(token_ids), np.float32)))
    return samples
