"""A formula as a line of text, which stands beside the code that computes it.

Takes:  a text in which `{clip_range}` stands for algo.clip_range, `{rollout.max_tokens}` for another group's option.
Gives:  `Formula`, with the options' values (for `explain`) or with their symbols (for the tables in the docs).
Never:  computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: option ► what papers call it; an option without a symbol goes by its name
SYMBOLS = {
    "clip_range": "ε", "clip_range_high": "ε_high", "dual_clip": "c", "beta": "β", "label_smoothing": "ε",
    "gamma": "γ", "gae_lambda": "λ", "tis_cap": "C", "icepop_low": "C_low", "icepop_high": "C_high",
    "rollout.max_tokens": "L_max", "critic.clip_range": "ε_v",
}

PLACEHOLDER = re.compile(r"\{([a-z][\w.]*)\}")


@dataclass(frozen=True)
class Formula:
    text: str
    source: str = ""  # paper (an arXiv number where there is one) and equation
    where: str = ""   # what its symbols stand for
    given: Mapping[str, str] = field(default_factory=dict)  # option ► the text where it is on; … is the text without it
    reads: tuple[str, ...] = ()  # options that the code reads and the text doesn't show

    def at(self, values: Mapping[str, object]) -> Formula:
        """With the options' values in their places. A name that isn't among them stays in its braces."""
        text = self.text
        for option, changed in self.given.items():
            text = changed.replace("…", text) if values.get(option) else text
        written = {key: _written(value) for key, value in values.items()}
        return replace(self, text=_put(text, written), where=_put(self.where, written), given={})

    def symbolic(self) -> str:
        """With the options' symbols in their places, and what each further option makes of it."""
        changed = [f"with `{full_name(option)}`: {text}" for option, text in self.given.items()]
        return _put("; ".join([str(self), *changed]), {option: SYMBOLS.get(option, option) for option in self.options})

    def __str__(self) -> str:
        return ", where ".join(filter(None, [self.text, self.where]))

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it names, in the order of the text."""
        named = PLACEHOLDER.findall(" ".join([self.text, self.where, *self.given.values()]))
        return tuple(dict.fromkeys([*named, *self.given, *self.reads]))


def full_name(option: str) -> str:
    """The option with its group: that of an option without one is algo."""
    return option if "." in option else f"algo.{option}"


def _put(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
