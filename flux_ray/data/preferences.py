"""Preference rows where prompts are wanted: what both responses share.

Takes:  a row with `chosen` and `rejected`, whole transcripts or lists of messages.
Gives:  `shared_prompt`: text up to the reply in which they part, or the messages before it; `warning_of_repeats`.
Knows:  how such transcripts mark a reply: a blank line and `Assistant:`.
"""

from __future__ import annotations

import os
from itertools import takewhile

from flux_ray.data.rows import BadCell, Row, Rows
from flux_ray.records import Message

CHOSEN, REJECTED = "chosen", "rejected"
LEAST_REPEATS = 10  # rows: fewer may repeat their prompts by chance
REPLY = "\n\nAssistant:"  # what a reply follows in a transcript


def shared_prompt(row: Row) -> str | list[Message]:
    """The prompt of both responses. BadCell where they have none in common.

    >>> start = "\\n\\nHuman: hi\\n\\nAssistant:"
    >>> shared_prompt({"chosen": f"{start} Hello", "rejected": f"{start} Hey"}) == start
    True
    """
    chosen, rejected = row[CHOSEN], row[REJECTED]
    if isinstance(chosen, str) and isinstance(rejected, str):
        # character by character is what is wanted
        start, mark, _ = os.path.commonprefix([chosen, rejected]).rpartition(REPLY)  # noqa: RUF071
        if not mark:
            raise BadCell(f"{CHOSEN} and {REJECTED} share no text up to a reply ({REPLY!r})", CHOSEN)
        return start + mark
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
        messages = [message for message, _ in same]
        if messages:
            return messages
    raise BadCell(f"{CHOSEN} and {REJECTED} must be two texts or two lists of messages with a start in common", CHOSEN)


def warning_of_repeats(rows: Rows, prompt_column: str, *replies: str) -> list[str]:
    """A warning where every reply of every row begins with the row's prompt, as transcripts do: it is there twice then.

    Nothing is cut off, for a task may be to repeat.
    """
    if len(rows.rows) < LEAST_REPEATS or not {prompt_column, *replies} <= set(rows.columns):
        return []
    for row in rows.rows:
        prompt = row[prompt_column]
        if not isinstance(prompt, str) or not prompt or not all(str(row[name]).startswith(prompt) for name in replies):
            return []
    return [f"{rows.source}: every {' and '.join(replies)} begins with its prompt, which the model reads twice then: "
            f"leave it out of {'it' if len(replies) == 1 else 'them'}, unless the task is to repeat it"]
