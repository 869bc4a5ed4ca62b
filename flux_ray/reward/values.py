"""What a reward function may give.

Takes:  what it gave for so many samples.
Gives:  `checked`: floats, None, or dicts of these; RewardError, which names the sample whose value is wrong;
        `sorted_out`: the good values, and what is wrong with others; `own_arguments`: what a function is given
        beside the data.
Knows:  nan is None, as TRL takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import SupportsFloat, SupportsIndex

RAISED, TIMED_OUT, BAD_RESULT = "raised", "timed_out", "bad_result"

MAX_SHOWN_CHARS = 60  # of a wrong value, in an error of one line

#: Of a sample: a number, none, or parts.
Value = float | None | dict[str, float | None]


class RewardError(RuntimeError):
    """A reward function failed. `kind` is RAISED, TIMED_OUT or BAD_RESULT; it survives pickling."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


def own_arguments(state: Mapping[str, object], logged: dict[str, float]) -> dict[str, object]:
    """The arguments that TRL's GRPOTrainer adds to the data's. `state`: trainer_state's fields; log_metric fills
    `logged`."""
    return {
        "trainer_state": SimpleNamespace(**state),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: logged.__setitem__(str(name), float(value)),
    }


def checked(result: object, size: int, who: str) -> list[Value]:
    """The values as floats, None, or dicts of these. RewardError (BAD_RESULT) names the sample with another value."""
    values, wrong = sorted_out(result, size, who)
    for sample, why in wrong.items():
        raise RewardError(f"{who}, sample {sample + 1} of {size}{why}", BAD_RESULT)
    return values


def sorted_out(result: object, size: int, who: str) -> tuple[list[Value], dict[int, str]]:
    """The values as `checked` gives them, and what is wrong with others, by sample: their value is None.

    What is wrong goes on from `sample 1 of 2`. RewardError (BAD_RESULT) where there isn't one for each sample.
    """
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise RewardError(f"{who}: gave {_shown(result)}, not a list of {size} values", BAD_RESULT)
    values: list[object] = list(result)
    if len(values) != size:
        raise RewardError(f"{who}: gave {len(values)} values for {size} samples", BAD_RESULT)
    good: list[Value] = [None] * size
    wrong: dict[int, str] = {}
    for sample, value in enumerate(values):
        try:
            good[sample] = _checked_value(value)
        except _Wrong as error:
            wrong[sample] = str(error)
    return good, wrong


class _Wrong(Exception):
    pass


def _checked_value(value: object) -> Value:
    if isinstance(value, dict):
        return {str(name): _checked_number(part, f", part {name!r}") for name, part in value.items()}
    return _checked_number(value)


def _checked_number(value: object, part: str = "") -> float | None:
    if value is None:
        return None
    number = math.inf
    if isinstance(value, (SupportsFloat, SupportsIndex)):
        with suppress(TypeError, ValueError):
            number = float(value)
    if math.isinf(number):
        raise _Wrong(f"{part}: gave {_shown(value)}, not a finite number or None")
    return None if math.isnan(number) else number


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '…'}"
