"""The objectives on preference pairs as their papers state them, in plain NumPy float64, one pair at a time.

Takes:  log-probs or scores (B, 2): chosen, rejected; settings as plain keywords.
Gives:  `loss` and `gradient`, its derivative by every entry (complex step, as in oracle.py).
Never:  imports the code it is compared with.
"""

from __future__ import annotations

import numpy as np

STEP = 1e-30


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def loss(name, values, *, reference=None, num_tokens=None, margins=None, beta=0.1, epsilon=0.1, mean=False):
    total = 0.0
    for b in range(len(values)):
        chosen, rejected = values[b]
        if name == "reward_model":
            total += -np.log(sigmoid(chosen - rejected - margins[b]))
            continue
        if reference is not None:
            chosen, rejected = chosen - reference[b, 0], rejected - reference[b, 1]
        if mean:
            chosen, rejected = chosen / num_tokens[b, 0], rejected / num_tokens[b, 1]
        h = chosen - rejected
        if name == "dpo":
            total += -np.log(sigmoid(beta * h))
        elif name == "cdpo":
            total += -(1 - epsilon) * np.log(sigmoid(beta * h)) - epsilon * np.log(sigmoid(-beta * h))
        elif name == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            raise KeyError(name)
    return total / len(values)


def gradient(name, values, **settings):
    slope = np.zeros(values.shape)
    for place in np.ndindex(*values.shape):
        moved = values.astype(complex)
        moved[place] += 1j * STEP
        slope[place] = np.imag(loss(name, moved, **settings)) / STEP
    return slope
