"""Whether two answers are one expression, by math-verify.

Takes:  two answers as a policy and a data set write them.
Gives:  `same_expression`.
Knows:  math-verify reads words as products of letters, for which Paris is Sirap: words are left to other rules.
Never:  takes longer than it may: whoever writes 9^{9^{9}} is wrong. Needs the main thread, for the timer is a signal.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flux_ray.reward.answers import parts_of, plain

MAX_CHARS = 512  # of an answer
MAX_SHARE = 1e-6
#: What math-verify reads past: what is left out of a list, quantifiers, a number's base.
NOT_READ = re.compile(r"\\(?:[lc]?dots|forall|exists)|\.\.\.|…|\d\s*_")
OR = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*or\s*\}")
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\(\w\))?")  # x, \theta, a_1, f(x)
LETTERS_ALONE = re.compile(r"[^\W\d_\\]+(?:[\s.,'()-]+[^\W\d_\\]+)*[\s.,()]*")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]*matrix\}|\\(?:begin|end)\s*\{cases\}")
WORD = re.compile(r"(?<!\\)(?<![A-Za-z\\])[A-Za-z]{3,}")
UNIT_AFTER = re.compile(r"\d\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:or|and)\b)")  # 5 cm isn't 5 m
FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan",
                       "sinh", "cosh", "tanh", "max", "min", "gcd", "lcm", "det", "lim", "mod"})  # fmt: skip


class _Late(BaseException):
    """The time is over. Not an Exception: math-verify takes those for a wrong answer and goes on."""


def same_expression(text: str, gold: str, *, seconds: float) -> bool:
    r"""Whether both have one value, set, interval, equation or matrix. False where that isn't told in time.

    >>> same_expression("2\\sqrt{2}", "\\sqrt{8}", seconds=5.0), same_expression("(1, 2]", "[1, 2]", seconds=5.0)
    (True, False)
    """
    if not text.strip() or max(len(text), len(gold)) > MAX_CHARS or _is_words(text) or _is_words(gold):
        return False
    text, gold = _as_set(text), _as_set(gold)
    if NOT_READ.search(text) or NOT_READ.search(gold) or _brackets(text) != _brackets(gold):
        return False
    if ("=" in text) != ("=" in gold) and not all(_names_a_value(one) for one in (text, gold)):
        return False
    parse, verify = _library()
    try:
        with _at_most(seconds):
            right, given = parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{text}}}")
            return bool(verify(right, given)) and not _far_apart(right, given)
    except _Late:
        return False


def _as_set(text: str) -> str:
    """Values with an "or" between them are those of a set."""
    values = OR.split(text)
    return text if len(values) == 1 else rf"\{{{', '.join(value.strip() for value in values)}\}}"


def _names_a_value(text: str) -> bool:
    """Whether it is a value, or a name = value: of any other equation math-verify takes the right side for one."""
    left, equals, _ = text.partition("=")
    return not equals or bool(NAME.fullmatch(left.strip()))


def _brackets(text: str) -> str:
    """Of a list: (1, 2) is no set."""
    parts = parts_of(plain(text).strip())
    return parts[0] if parts else ""


def _far_apart(right: list[Any], given: list[Any]) -> bool:
    """Whether two numbers differ by more than a share of 1e-6: math-verify takes 2^{-99} for 2^{-98}."""
    pair = [one[0] for one in (right, given) if one and getattr(one[0], "is_number", False)]
    if len(pair) < 2 or pair[1].is_zero is not False:
        return False
    try:
        return bool(abs((pair[0] / pair[1]).evalf(15) - 1) > MAX_SHARE)
    except (TypeError, ValueError, ArithmeticError):  # not a real number: math-verify's word stands
        return False


def _is_words(text: str) -> bool:
    if UNIT_AFTER.search(text):
        return True
    text = plain(ENVIRONMENT.sub(" ", text)).strip()
    return bool(LETTERS_ALONE.fullmatch(text)) or any(word[0] not in FUNCTIONS for word in WORD.finditer(text))


def is_missing() -> bool:
    return importlib.util.find_spec("math_verify") is None


@functools.cache
def _library() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
    """`parse` and `verify`: seconds to import. Without timers of their own, one of which would end ours."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of timers that are off, and of each failure
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parse(r"\boxed{x}", extraction_config=kinds, parsing_timeout=None)  # imports what would count as a formula's time
    return (functools.partial(parse, extraction_config=kinds, parsing_timeout=None),
            functools.partial(verify, timeout_seconds=None))


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Of processor time: what is right must not depend on who else computes on the machine."""
    def end(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
