"""Values as Hydra's command line reads them.

Gives:  `hydra_value`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: What Hydra reads as a text without quotes (a tilde isn't, nor are letters beyond ASCII).
PLAIN = re.compile(r"[\w./:$%@?|*+-]+", re.ASCII)


def hydra_value(value: object) -> str:
    """The text after `option=`.

    >>> hydra_value([1, "a b"]), hydra_value({"min": 1, "on": True}), hydra_value(None), hydra_value("it's")
    ("[1,'a b']", '{min:1,on:true}', 'null', "'it\\\\'s'")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{hydra_value(key)}:{hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    text = str(value)
    if isinstance(value, str) and not (PLAIN.fullmatch(text) and _stays_text(text)):
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
        return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
    return text


def _stays_text(text: str) -> bool:
    """Whether Hydra doesn't take it for a number or a word of its own."""
    return not re.fullmatch(r"null|true|false|[+-]?(nan|inf)|[+-]?[\d._]+(e[+-]?\d+)?", text, re.IGNORECASE)
