r"""The rewards that come with it: pure functions of texts and tokens.

Takes:  prompts, completions (texts, or lists of messages), the rows' columns as lists; options by keyword.
Gives:  one value a completion; None where a rule has nothing to say (the row has no answer).
Knows:  that a cell may hold several answers, as a list: any of them is right.
Never:  raises over what a policy wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from flux_ray.records import Message
from flux_ray.reward.answers import (
    answer_part,
    expression_in,
    golds,
    parse_number,
    said,
    same_answer,
    whole_number,
)
from flux_ray.reward.symbols import same_expression

#: The default format: the response ends in `####` and one number, as GSM8K's solutions do.
MARKED_NUMBER_AT_END = r"####[ \t]*[-+]?[$€£]?[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?[ \t]?%?\s*\Z"

Reward = float | None
Texts = Sequence[str | list[Message]]  # G prompts or completions: texts, or lists of chat messages
Column = Sequence[object]  # G cells of a column of the data


def text_of(completion: str | list[Message]) -> str:
    """The text of a completion, which for a chat is a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def exact_match(
    prompts: Texts, completions: Texts, answer: Column, *, ignore_case: bool = False, **columns: object
) -> list[Reward]:
    """1 where the completion is the answer, blanks around both aside.

    >>> exact_match(None, ["42\\n", "41", "b"], [42, "42", ["a", "b"]])
    [1.0, 0.0, 1.0]
    """

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return _graded(completions, answer, lambda text, gold: plain(text) == plain(gold))


def numeric(
    prompts: Texts, completions: Texts, answer: Column, *, tolerance: float = 1e-6, **columns: object
) -> list[Reward]:
    """1 where the completion's number is the answer's, give or take `tolerance` (below 1: that share of it).

    None where the answer has no number.

    >>> numeric(None, ["so 6*7 = 42.", "#### 1,000", "none"], ["42", "steps ... #### 1000", "3"])
    [1.0, 1.0, 0.0]
    """
    close = close_within(tolerance)

    def is_right(text: str, gold: str) -> bool | None:
        right = parse_number(gold)
        if right is None:
            return None
        number = parse_number(text)
        return number is not None and close(number, right)

    return _graded(completions, answer, is_right)


def numeric_or_exact(
    prompts: Texts, completions: Texts, answer: Column, *, tolerance: float = 1e-6, **columns: object
) -> list[Reward]:
    r"""`numeric` where the answer, or what it marks by `####` or `\boxed{}`, is a number; else the texts must agree.

    What a completion marks as its answer is compared, or all of it, however the two are written (`same_answer`).

    >>> numeric_or_exact(None, ["It is \\boxed{\\text{Paris}}", "The sum: 4", "(1, 2)"], ["Paris", "4", "(1,2)"])
    [1.0, 1.0, 1.0]
    """
    close = close_within(tolerance)
    return _graded(completions, answer, lambda text, gold: numbers_or_texts_agree(text, gold, close))


def numbers_or_texts_agree(text: str, gold: str, close: Callable[[Fraction, Fraction], bool]) -> bool:
    """`numeric_or_exact` of one completion and one answer. An empty completion answers nothing."""
    if not text.strip():
        return not gold.strip()
    part, (gold, _) = answer_part(text)[0], answer_part(gold)
    right = whole_number(gold)
    if right is not None:
        number = parse_number(text)
        if number is not None and close(number, right):
            return True
    return same_answer(part, gold, close) or same_answer(text, gold, close)


def math(
    prompts: Texts, completions: Texts, answer: Column, *, tolerance: float = 1e-6, seconds: float = 2.0,
    **columns: object,
) -> list[Reward]:
    r"""`numeric_or_exact`, and where that says no and not both are plain numbers, math-verify (`same_expression`).

    What a completion marks as its answer is compared, or its last formula, or its last line. `seconds`: for one
    completion, which is wrong where that isn't enough. Runs in a process's main thread alone.

    >>> math(None, ["so \\boxed{2\\sqrt{2}}", "\\boxed{x > 5}", "It is 4."], ["\\sqrt{8}", "5", "4"])
    [1.0, 0.0, 1.0]
    """
    close = close_within(tolerance)

    def is_right(text: str, gold: str) -> bool:
        if not text.strip() or numbers_or_texts_agree(text, gold, close):
            return bool(text.strip()) or not gold.strip()
        gold = answer_part(gold)[0]
        if whole_number(gold) is not None and parse_number(text) is not None:
            return False
        return same_expression(expression_in(text), gold, seconds=seconds)

    return _graded(completions, answer, is_right)


def regex(
    prompts: Texts, completions: Texts, *, pattern: str = MARKED_NUMBER_AT_END, **columns: object
) -> list[Reward]:
    """1 where the pattern is found in the completion; by default `#### NUMBER` at its end.

    >>> regex(None, ["2+2=4\\n#### 4", "4"])
    [1.0, 0.0]
    """
    search = re.compile(pattern).search
    return [float(search(text_of(completion)) is not None) for completion in completions]


def length(
    prompts: Texts,
    completions: Texts,
    completion_ids: Sequence[Sequence[int]],
    *,
    target: int = 0,
    penalty: float = 0.001,
    **columns: object,
) -> list[Reward]:
    """Minus `penalty` for each token beyond `target` tokens.

    >>> length(None, ["..."], [[1, 2, 3]], target=1, penalty=.5)
    [-1.0]
    """
    return [-penalty * max(0, len(ids) - target) for ids in completion_ids]


def repetition(
    prompts: Texts,
    completions: Texts,
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram: int = 3,
    penalty: float = 1.0,
    **columns: object,
) -> list[Reward]:
    """Minus `penalty` times the share of n-grams of tokens that were there before (2502.03373, appendix C.2).

    >>> repetition(None, ["..."], [[5, 5, 5, 5, 5]], ngram=2)
    [-0.75]
    """
    if ngram < 1:
        raise ValueError(f"ngram must be >= 1, got {ngram}")
    rewards: list[Reward] = []
    for ids in completion_ids:
        grams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
        rewards.append(-penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
    return rewards


RULES: dict[str, Callable[..., list[Reward]]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "numeric_or_exact": numeric_or_exact,
    "math": math,
    "regex": regex,
    "format": regex,
    "length": length,
    "repetition": repetition,
}
#: Those that need a process's main thread.
IN_MAIN_THREAD = frozenset({"math"})
SHAPING = frozenset({"length", "repetition"})  # not the task: left out of ScoredGroup.task_rewards


def _graded(completions: Texts, answer: Column, is_right: Callable[[str, str], bool | None]) -> list[Reward]:
    """1 where any right answer of the cell is the completion's; None where the cell holds none.

    `is_right(completion, gold)`: None where the rule can't compare with that answer.
    """
    rewards: list[Reward] = []
    for completion, cell in zip(completions, answer, strict=True):
        text = said(text_of(completion))
        found = [is_right(text, gold) for gold in golds(cell)]
        rewards.append(float(any(found)) if any(one is not None for one in found) else None)
    return rewards


def close_within(tolerance: float) -> Callable[[Fraction, Fraction], bool]:
    """Of a number below 1 that share: 1e-10 isn't 2e-10."""
    allowed = Fraction(tolerance)
    return lambda one, right: abs(one - right) <= allowed * min(Fraction(1), abs(right))
