"""The algorithms as their papers state them, in plain NumPy float64, one sequence and one token at a time.

Takes:  arrays (N, L) and a mask; settings as plain keywords.
Gives:  `advantages`, and `loss` with `gradient`, its derivative by every log-prob.
Knows:  derivatives by the complex step: f(x + ih).imag / h is exact to rounding, for branches go by the real part and a
        stop-gradient keeps the real part alone.
Never:  imports the code it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEP = 1e-30  # of the complex step: nothing is subtracted, so it may be as small as one likes
EPS_STD = 1e-6


# --- advantages ----------------------------------------------------------------------------------------------------

def advantages(name, rewards, mask, index, *, normalize=True, kl_coef=0.0, old=None, reference=None):
    num_rows, length = rewards.shape
    token_rewards = rewards.astype(np.float64).copy()
    if kl_coef:
        for n in range(num_rows):
            for t in range(length):
                if mask[n, t]:
                    token_rewards[n, t] -= kl_coef * (old[n, t] - reference[n, t])
    score = [sum(row) for row in token_rewards]
    result = np.zeros((num_rows, length))
    for n in range(num_rows):
        group = [score[m] for m in range(num_rows) if index[m] == index[n]]
        for t in range(length):
            if not mask[n, t]:
                continue
            if name in ("grpo", "grpo_vectorized"):
                result[n, t] = _grpo(score[n], group, normalize)
            elif name == "dr_grpo":
                result[n, t] = 0.0 if len(group) < 2 else score[n] - np.mean(group)
            elif name == "rloo":
                result[n, t] = 0.0 if len(group) < 2 else score[n] - (sum(group) - score[n]) / (len(group) - 1)
            elif name in ("reinforce", "reinforce_pp"):
                result[n, t] = sum(token_rewards[n, t:])
            elif name == "reinforce_pp_baseline":
                result[n, t] = 0.0 if len(group) < 2 else score[n] - np.mean(group)
            else:
                raise KeyError(name)
    if name in ("reinforce_pp", "reinforce_pp_baseline"):
        tokens = [result[n, t] for n in range(num_rows) for t in range(length) if mask[n, t]] or [0.0]
        for n in range(num_rows):
            for t in range(length):
                if mask[n, t]:
                    result[n, t] = (result[n, t] - np.mean(tokens)) / (np.std(tokens) + EPS_STD)
    return result


def _grpo(score, group, normalize):
    if len(group) < 2 or max(group) == min(group):
        return 0.0
    return (score - np.mean(group)) / ((np.std(group, ddof=1) + EPS_STD) if normalize else 1.0)


# --- losses --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    loss: str = "ppo"
    aggregation: str = "sequence_mean"
    max_tokens: int = 8
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    off_policy: str = "none"
    level: str = "token"
    cap: float = 2.0
    band: tuple[float, float] = (0.5, 5.0)


def loss(settings, *, log_prob, old, sampler, reference, entropy, advantages, mask):
    """The step's loss. `old`: the ratio's denominator (None: π itself, stopped), which corrections are of as well."""
    s = settings
    num_sequences = sum(1 for row in mask if row.any())
    num_tokens = int(mask.sum())
    total = 0.0
    for n in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[n, t]]
        if not tokens:
            continue
        new = [log_prob[n, t] for t in tokens]
        before = [stop(z) for z in new] if old is None else [old[n, t] for t in tokens]
        terms = policy_terms(s, new, before, [advantages[n, t] for t in tokens])
        if s.off_policy != "none":
            factors = corrections(s, before, [sampler[n, t] for t in tokens])
            terms = [term * factor for term, factor in zip(terms, factors, strict=True)]
        if s.beta:
            far = [kl(s.kl, z, reference[n, t]) for z, t in zip(new, tokens, strict=True)]
            terms = [term + s.beta * divergence for term, divergence in zip(terms, far, strict=True)]
        terms = [term - s.entropy_coef * entropy[n, t] for term, t in zip(terms, tokens, strict=True)]
        if s.aggregation == "token_mean":
            total += sum(terms) / num_tokens
        elif s.aggregation in ("sequence_mean", "sequence"):
            total += sum(terms) / len(tokens) / num_sequences
        else:
            assert s.aggregation == "constant_length"
            total += sum(terms) / s.max_tokens / num_sequences
    return total


def gradient(settings, **inputs):
    """d loss / d log_prob, (N, L)."""
    log_prob = inputs.pop("log_prob").astype(complex)
    slope = np.zeros(log_prob.shape)
    for place in np.ndindex(*log_prob.shape):
        moved = log_prob.copy()
        moved[place] += 1j * STEP
        slope[place] = np.imag(loss(settings, log_prob=moved, **inputs)) / STEP
    return slope


def policy_terms(s, new, before, advantage):
    """One term per loss token of one sequence; a sequence loss gives the same term at each."""
    log_ratios = [z - b for z, b in zip(new, before, strict=True)]
    if s.loss == "ppo":
        return [-surrogate(s, exp(x), a) for x, a in zip(log_ratios, advantage, strict=True)]
    if s.loss == "gspo":
        ratio = exp(sum(log_ratios) / len(log_ratios))
        return [-surrogate(s, ratio, a) for a in advantage]
    if s.loss == "gspo_token":
        ratio = stop(exp(sum(log_ratios) / len(log_ratios)))
        return [-surrogate(s, ratio * np.exp(z - stop(z)), a) for z, a in zip(new, advantage, strict=True)]
    if s.loss == "rloo":
        ratio = exp(sum(log_ratios))
        return [-surrogate(s, ratio, a) for a in advantage]
    if s.loss == "cispo":
        weights = [stop(smaller(exp(x), 1 + s.high)) for x in log_ratios]
        return [-w * a * z for w, a, z in zip(weights, advantage, new, strict=True)]
    assert s.loss == "reinforce"
    return [-a * z for a, z in zip(advantage, new, strict=True)]


def surrogate(s, ratio, advantage):
    value = smaller(ratio * advantage, clip(ratio, 1 - s.low, 1 + s.high) * advantage)
    if s.dual is not None and advantage < 0:
        value = larger(value, s.dual * advantage)
    return value


def was_clipped(s, ratio, advantage):
    return np.real(surrogate(s, ratio, advantage)) != np.real(ratio * advantage)


def corrections(s, proximal, sampler):
    logs = [stop(p) - m for p, m in zip(proximal, sampler, strict=True)]
    ratios = [np.exp(x) for x in logs] if s.level == "token" else [np.exp(sum(logs))] * len(logs)
    if s.off_policy == "tis":
        return [min(r, s.cap) for r in ratios]
    return [r if s.band[0] <= r <= s.band[1] else 0.0 for r in ratios]


def kl(estimator, new, reference):
    k1 = new - reference
    if estimator == "k2":
        return k1 * k1 / 2
    k1 = clip(k1, -20.0, 20.0)
    return np.exp(-k1) - 1 + k1


def exp(log_ratio):
    return np.exp(clip(log_ratio, -20.0, 20.0))


def stop(z):
    return np.real(z)


def smaller(a, b):
    return a if np.real(a) <= np.real(b) else b


def larger(a, b):
    return a if np.real(a) >= np.real(b) else b


def clip(z, low, high):
    return low if np.real(z) < low else high if np.real(z) > high else z
