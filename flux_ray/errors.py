"""What goes wrong, as the user sees it.

Takes:  a name that isn't known, or a mistake in one line.
Gives:  UserError (the command line prints its text alone and exits with 2), RunFailed (1) and the nearest right name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: one line with file, row, key and value. The command line shows no traceback."""


class RunFailed(RuntimeError):
    """A run that broke: its first cause in one line, and where its log is (the command line exits with 1)."""


class CheckFailed(RunFailed):
    """What was to be checked isn't right: one line (the command line exits with 1)."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that isn't known, with the nearest that is.

    >>> str(unknown("algorithm", "grop", ["grpo", "dapo"]))
    "unknown algorithm 'grop': did you mean 'grpo'? (known: dapo, grpo)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint} (known: {', '.join(names)})")
