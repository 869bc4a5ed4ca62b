"""The metrics of an evaluation that need each prompt by itself.

Takes:  EvaluatedPrompts: the scores and texts of all samples of a prompt.
Gives:  `by_prompt`: a value a prompt for each metric; `eval_metrics`: their means, with intervals.
Knows:  a sample is right where its task reward reaches `pass_reward`; unscored samples are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flux_ray.observability.estimates import interval, ks, majority_at_k, pass_at_k
from flux_ray.records import FAILED, Prompt, ScoredGroup
from flux_ray.reward.answers import answer_part, parse_number, said

LOW, HIGH = "_low", "_high"  # endings of an interval's ends
CLOSE = 1e-9                 # a sum of weighted parts may miss the level by rounding


@dataclass(frozen=True)
class EvaluatedPrompt:
    """A prompt with its scored samples.

    >>> EvaluatedPrompt(prompt, texts=("42", "7"), scored=scored).scored.rewards
    array([1., 0.])
    """

    prompt: Prompt
    texts: tuple[str, ...]  # (G,)
    scored: ScoredGroup

    @property
    def line(self) -> dict[str, object]:
        """As it is kept, one JSON object a prompt."""
        scored = self.scored
        return {"set": self.prompt.data_set, "row": self.prompt.row, "prompt": self.prompt.text,
                "completions": list(self.texts), "rewards": scored.rewards.tolist(),
                "task_rewards": scored.task_rewards.tolist(),
                "parts": {name: values.tolist() for name, values in scored.parts.items() if name != FAILED},
                "num_tokens": scored.num_loss_tokens.tolist(), "truncated": scored.truncated.tolist()}


def answer_of(text: str) -> str:
    r"""What a text answers, so that two ways to write it count as one: a number, else what it marks, else all of it.

    >>> answer_of("so it is 1,000."), answer_of("\\boxed{1000}"), answer_of(" yes ")
    ('1000', '1000', 'yes')
    """
    text = said(text)
    number = parse_number(text)
    return str(number) if number is not None else " ".join(answer_part(text)[0].split())


def by_prompt(everyone: Sequence[EvaluatedPrompt], *, pass_reward: float) -> dict[str, list[float]]:
    """Metric ► its value of each prompt; nan where a prompt has none.

    mean, task_mean, each part; pass@K and maj@K where prompts have several samples.
    """
    names = sorted({name for one in everyone for name in one.scored.parts} - {FAILED})
    values = {name: [_mean(one.scored.parts.get(name)) for one in everyone] for name in names}
    values["mean"] = [_mean(one.scored.rewards) for one in everyone]
    values["task_mean"] = [_mean(one.scored.task_rewards) for one in everyone]
    most = max((one.scored.group_size for one in everyone), default=1)
    if most == 1:
        return values
    voted = [_voters(one, pass_reward) for one in everyone]
    kinds: dict[str, Callable[[list[str], list[bool], int], float]] = {
        "pass@": lambda _, right, k: pass_at_k(len(right), sum(right), k), "maj@": majority_at_k}
    for kind, estimate in kinds.items():
        for k in ks(most):
            values[f"{kind}{k}"] = [estimate(answers, right, k) if len(right) >= k else np.nan
                                     for answers, right in voted]
    return values


def _voters(one: EvaluatedPrompt, pass_reward: float) -> tuple[list[str], list[bool]]:
    """Answers of the samples that have a reward, and whether each is right."""
    scored = [(answer_of(text), bool(reward >= pass_reward - CLOSE))
              for text, reward in zip(one.texts, one.scored.task_rewards, strict=True) if not np.isnan(reward)]
    return [answer for answer, _ in scored], [is_right for _, is_right in scored]


def _mean(values: np.ndarray | None) -> float:
    given = values[~np.isnan(values)] if values is not None else np.empty(0)
    return float(given.mean()) if len(given) else np.nan


def eval_metrics(values_of: Mapping[str, Sequence[float]], prefix: str) -> dict[str, float]:
    """pass@K and maj@K, means over prompts; the ends of the 95 % interval of each mean, as NAME_low, NAME_high.

    `values_of`: what by_prompt gives.
    """
    metrics: dict[str, float] = {}
    for name, values in values_of.items():
        given = np.array([value for value in values if not np.isnan(value)])
        if not len(given):
            continue
        low, high = interval(given)
        if name.startswith(("pass@", "maj@")):
            metrics[f"{prefix}/{name}"] = float(given.mean())
        metrics |= {f"{prefix}/{name}{LOW}": low, f"{prefix}/{name}{HIGH}": high}
    return metrics
