r"""The rewards that come with it: pure functions of texts and tokens.

Takes:  prompts, completions (texts, or lists of messages), the rows' columns as lists; options by keyword.
Gives:  one value a completion; None where a rule has nothing to say (the row has no answer).
Knows:  how an answer is written: `#### x`, `\boxed{x}`, or the last number; 1,234.50, $3, 50 %, 1/2, \frac{1}{2}.
Never:  raises over what a policy wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

MAX_NUMBER_CHARS = 64  # a longer run of digits is babble, and Fraction would be slow on it

NUMBER = re.compile(
    r"(?<![\w.)])(?P<sign>[-+]?)\s?[$€£]?\s?(?P<inner>[-+]?)"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e(?P<exponent>[-+]?\d{1,2})\b)?"
    r"(?:\s?/\s?(?P<below>\d+))?",
    re.IGNORECASE,
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
MARKED = re.compile(r"####(?P<answer>[^\n]*)")
#: The default format: the response ends in `####` and one number, as GSM8K's solutions do.
MARKED_NUMBER_AT_END = r"####[ \t]*[-+]?[$€£]?[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?[ \t]?%?\s*\Z"

Reward = float | None
Texts = Sequence[Any]  # G prompts or completions: texts, or lists of chat messages
Column = Sequence[Any]  # G cells of a column of the data


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, which for a chat is a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def exact_match(
    prompts: Texts, completions: Texts, answer: Column, *, ignore_case: bool = False, **columns: Any
) -> list[Reward]:
    """1 where the completion is the answer, blanks around both aside.

    >>> exact_match(None, ["42\\n", "41"], [42, "42"])
    [1.0, 0.0]
    """

    def plain(value: Any) -> str:
        text = str(value).strip()
        return text.casefold() if ignore_case else text

    return [
        None if expected is None else float(plain(text_of(completion)) == plain(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def numeric(
    prompts: Texts, completions: Texts, answer: Column, *, tolerance: float = 1e-6, **columns: Any
) -> list[Reward]:
    """1 where the completion's number is the answer's, give or take `tolerance`. None where the answer has no number.

    >>> numeric(None, ["so 6*7 = 42.", "#### 1,000", "none"], ["42", "steps ... #### 1000", "3"])
    [1.0, 1.0, 0.0]
    """
    allowed = Fraction(tolerance)
    rewards: list[Reward] = []
    for completion, expected in zip(completions, answer, strict=True):
        right = None if expected is None else parse_number(str(expected))
        rewards.append(None if right is None else float(_close(parse_number(text_of(completion)), right, allowed)))
    return rewards


def numeric_or_exact(
    prompts: Texts, completions: Texts, answer: Column, *, tolerance: float = 1e-6, **columns: Any
) -> list[Reward]:
    r"""`numeric` where the answer is a number, or marks one by `####` or `\boxed{}`; else the texts must agree.

    What a completion marks as its answer is compared, or all of it.

    >>> numeric_or_exact(None, ["It is \\boxed{Paris}", "The sum: 4"], ["Paris", "4"])
    [1.0, 1.0]
    """
    allowed = Fraction(tolerance)
    rewards: list[Reward] = []
    for completion, expected in zip(completions, answer, strict=True):
        if expected is None:
            rewards.append(None)
            continue
        text, gold = text_of(completion), _answer_part(str(expected)).strip()
        right = whole_number(gold)
        same = _answer_part(text).strip() == gold or text.strip() == gold
        rewards.append(float(same or (right is not None and _close(parse_number(text), right, allowed))))
    return rewards


def regex(prompts: Texts, completions: Texts, *, pattern: str = MARKED_NUMBER_AT_END, **columns: Any) -> list[Reward]:
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
    **columns: Any,
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
    **columns: Any,
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
    "regex": regex,
    "format": regex,
    "length": length,
    "repetition": repetition,
}
SHAPING = frozenset({"length", "repetition"})  # not the task: left out of ScoredGroup.task_rewards


def parse_number(text: str) -> Fraction | None:
    r"""The number that a text gives: after the last `####`, else in the last `\boxed{}`, else the last one in it.

    >>> parse_number("3 of 4, so \\boxed{\\frac{3}{4}}"), parse_number("$1,234.50 in all"), parse_number("none")
    (Fraction(3, 4), Fraction(2469, 2), None)
    """
    text = _answer_part(text)
    fractions = list(FRACTION.finditer(text))
    numbers = [match for match in NUMBER.finditer(text) if len(match.group()) <= MAX_NUMBER_CHARS]
    if fractions and (not numbers or fractions[-1].end() >= numbers[-1].end()):
        top, below = (int(part[:MAX_NUMBER_CHARS]) for part in fractions[-1].groups())
        return Fraction(top, below) if below else None
    return _value(numbers[-1]) if numbers else None


def whole_number(text: str) -> Fraction | None:
    """The number that a text is as a whole (sign, currency, percent and full stop aside); None where it says more."""
    bare = text.strip().removesuffix(".").removesuffix("%").strip()
    if FRACTION.fullmatch(bare.strip("$")) or NUMBER.fullmatch(bare.strip("$")) or NUMBER.fullmatch(bare):
        return parse_number(bare)
    return None


def _answer_part(text: str) -> str:
    """What stands after the last `####`, else in the last `\\boxed{}`; else all of it."""
    marked = MARKED.findall(text)
    if marked:
        return marked[-1]
    boxed = _last_boxed(text)
    return text if boxed is None else boxed


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(match["number"].replace(",", ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["below"]:
        if not int(match["below"]):
            return None
        value /= int(match["below"])
    return -value if "-" in (match["sign"], match["inner"]) else value


def _close(value: Fraction | None, right: Fraction, tolerance: Fraction) -> bool:
    return value is not None and abs(value - right) <= tolerance
