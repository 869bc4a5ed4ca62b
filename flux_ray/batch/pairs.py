"""From preference pairs to samples side by side.

Takes:  PreferencePairs.
Gives:  `pair_samples`: chosen, rejected, chosen, rejected …, for `pack(..., unit=2)`.
Knows:  a policy is asked for the log-probs of the responses, a reward model for one score at each one's end.
Never:  weighs: a pair counts 1/N, which whoever knows N says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flux_ray.records import PreferencePair, Sample


def pair_samples(pairs: Sequence[PreferencePair], *, last_token: bool = False) -> list[Sample]:
    """Two Samples a pair. The loss mask: all tokens of the response, or its last token alone; loss weights are 0."""
    samples = []
    for pair in pairs:
        for token_ids in (pair.chosen_ids, pair.rejected_ids):
            first = len(token_ids) - 1 if last_token else pair.prompt_length
            loss_mask = np.arange(len(token_ids)) >= first
            samples.append(Sample(token_ids, loss_mask, np.zeros(len(token_ids), np.float32)))
    return samples
