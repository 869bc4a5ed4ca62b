"""What another library's option is here.

Gives:  Counterpart: our option's name; `values(option, {theirs: ours})` where the values differ too; `none(sentence)`
        where there is no such option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Values:
    option: str
    ours: Mapping[str, object]  # by their value, as text


@dataclass(frozen=True)
class Missing:
    instead: str  # one sentence: what there is, or why not


Counterpart = str | Values | Missing


def values(option: str, ours: Mapping[str, object]) -> Values:
    return Values(option, ours)


def none(instead: str) -> Missing:
    return Missing(instead)
