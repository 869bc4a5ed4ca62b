"""What a reward function may give.

Takes:  what it gave for so many samples.
Gives:  `checked`: floats, None, or dicts of these; RewardError, which names the sample whose value is wrong;
        `own_arguments`: what a function is given beside the data.
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
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise RewardError(f"{who}: gave {_shown(result)}, not a list of {size} values", BAD_RESULT)
    values: list[object] = list(result)
    if len(values) != size:
        raise RewardError(f"{who}: gave {len(values)} values for {size} samples", BAD_RESULT)
    return [_checked_value(value, f"{who}, sample {place} of {size}") for place, value in enumerate(values, start=1)]


def _checked_value(value: object, who: str) -> Value:
    if isinstance(value, dict):
        return {str(name): _checked_number(part, f"{who}, part {name!r}") for name, part in value.items()}
    return _checked_number(value, who)


def _checked_number(value: object, who: str) -> float | None:
    if value is None:
        return None
    number = math.inf
    if isinstance(value, (SupportsFloat, SupportsIndex)):
        with suppress(TypeError, ValueError):
            number = float(value)
    if math.isinf(number):
        raise RewardError(f"{who}: gave {_shown(value)}, not a finite number or None", BAD_RESULT)
    return None if math.isnan(number) else number


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '…'}"
