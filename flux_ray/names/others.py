"""Other libraries' options by the names that those have.

Gives:  `counterpart`: what an option of another library is here; `our_value`, of a value that is written otherwise.
Knows:  the tables of TRL, OpenRLHF, verl and others, one file each; a name without its section is found by its end.
Never:  guesses.
"""

from __future__ import annotations

import fnmatch

from flux_ray.names import openrlhf, seeds, trl, verl
from flux_ray.names.counterpart import Counterpart, Missing, Values

TABLES: dict[str, dict[str, Counterpart]] = {
    "flux": seeds.TABLE, "trl": trl.TABLE, "openrlhf": openrlhf.TABLE, "verl": verl.TABLE,
}

#: verl's names without their sections, where those agree on what they mean.
_VERL_ENDS: dict[str, Counterpart] = {}
for _name, _ours in verl.TABLE.items():
    _end = _name.rpartition(".")[2]
    if _VERL_ENDS.setdefault(_end, _ours) != _ours:
        _VERL_ENDS[_end] = Missing(f"verl has several options of the name {_end}: write it with its sections")


def counterpart(name: str) -> Counterpart | None:
    """Ours for a name of theirs, with its sections or without; None for a name that no library has."""
    for table in (*TABLES.values(), _VERL_ENDS):
        if name in table:
            return table[name]
    return None


def section_counterpart(name: str) -> Missing | None:
    """What there is instead of a whole section of verl's that the name lies in."""
    return next((missing for pattern, missing in verl.PATTERNS.items() if fnmatch.fnmatchcase(name, pattern)), None)


def is_section(name: str) -> bool:
    """Whether another library's options lie below that name."""
    below = f"{name}."
    return any(option.startswith(below) for table in TABLES.values() for option in table)


def option_of(ours: Counterpart) -> str | None:
    """The option of ours that it is; None where there is none."""
    if isinstance(ours, Missing):
        return None
    return ours.option if isinstance(ours, Values) else ours


def our_value(name: str, value: object) -> object:
    """The value in our words, where theirs are others; the value itself elsewhere.

    >>> our_value("loss_agg_mode", "token-mean"), our_value("use_cpu", True), our_value("learning_rate", 1e-6)
    ('token_mean', 'cpu', 1e-06)
    """
    ours = counterpart(name)
    if not isinstance(ours, Values):
        return value
    by_text = {text.lower(): new for text, new in ours.ours.items()}
    return by_text.get(str(value).lower(), value)
