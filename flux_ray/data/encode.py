"""From a row of data to the text of its prompt, and how long that may be.

Takes:  a row, the config of its set.
Gives:  the prompt as text or messages (template and system prompt applied); `asked`: what of it a policy is asked; the
        longest that a prompt may be.
Never:  makes tokens (tokens.py does).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from flux_ray.config import DataConfig, PromptDataConfig, SampledConfig
from flux_ray.data.chat import ASSISTANT, checked_messages, with_system, without_reply
from flux_ray.data.forms import as_chat
from flux_ray.data.preferences import CHOSEN, REJECTED, shared_prompt
from flux_ray.data.rows import BadCell, Row, Rows, inside
from flux_ray.errors import UserError, unknown
from flux_ray.records import Message

Text = str | list[Message]


def are_pairs(rows: Rows, data: DataConfig) -> bool:
    """Whether rows are pairs without a prompt of their own: the prompt is what both responses share."""
    return data.prompt_column not in rows.columns and {CHOSEN, REJECTED} <= set(rows.columns)


def asked(row: Row, data: PromptDataConfig, *, pairs: bool) -> tuple[Text, bool]:
    """What a policy is asked in a row, and whether a reply at its end was left out (data.prefill goes on with it).

    pairs: as `are_pairs` says of the rows. Errors as of prompt_text.
    """
    text = prompt_text({**row, data.prompt_column: shared_prompt(row)} if pairs else row, data)
    if isinstance(text, str) or data.prefill or text[-1]["role"] != ASSISTANT:
        return text, False
    return without_reply(text), True


def prompt_text(row: Row, data: DataConfig) -> Text:
    """The prompt of a row. BadCell: the row is bad. UserError: the config doesn't go with the data."""
    value = as_chat(row[data.prompt_column])
    if isinstance(value, list):
        if data.prompt_template is not None:
            raise UserError(f"data.prompt_template is for plain text, but column {data.prompt_column!r} has messages")
        return with_system(checked_messages(value), data.system_prompt)
    text = checked_text(value)
    if data.prompt_template is not None:
        text = fill_template(data.prompt_template, row, text)
    if data.as_chat:
        return with_system([{"role": "user", "content": text}], data.system_prompt)
    if data.system_prompt is not None:
        raise UserError("data.system_prompt is for chats, but the prompts are plain text: set data.as_chat=true")
    return text


def checked_text(value: object) -> str:
    """The text of a cell. BadCell says why it is none."""
    if value is None:
        raise BadCell("missing")
    if not isinstance(value, str):
        raise BadCell(f"must be text or a list of messages, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise BadCell("empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a character, which JSON can write and no tokenizer takes
        raise BadCell(f"no valid text: {error.reason} at character {error.start + 1}") from error
    return value


class _Cells(string.Formatter):
    """Fields are columns, nested ones by dots. The text of a cell is never read as a format."""

    def get_field(self, field_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        row = dict(kwargs)
        if field_name in row:
            return row[field_name], field_name
        found = inside(row, field_name)
        return (found, field_name) if found is not None else super().get_field(field_name, args, kwargs)


def fill_template(template: str, row: Row, prompt: str) -> str:
    """The template with {prompt} and {COLUMN} filled in.

    UserError names a column that isn't there. BadCell: a value of the row lacks what the template asks of it.
    """
    try:
        return _Cells().vformat(template, (), {**row, "prompt": prompt})
    except KeyError as error:
        raise UserError(f"data.prompt_template: {unknown('column', str(error.args[0]), {*row, 'prompt'})}") from error
    except TypeError as error:
        raise BadCell(f"data.prompt_template {template!r}: {error}") from error
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"data.prompt_template {template!r}: {error} (write a brace twice to keep it)") from error


def prompt_limit(data: PromptDataConfig, rollout: SampledConfig, context_length: int) -> tuple[int, str]:
    """Tokens that the longest prompt may have, and why no more. UserError where the response leaves no room."""
    max_tokens, given = rollout.max_tokens, data.max_prompt_tokens
    room = context_length - max_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_tokens={max_tokens} leaves no room for a prompt in a context of {context_length} tokens"
        )
    if given is not None and given < room:
        return given, f"more than data.max_prompt_tokens={given}"
    return room, f"more than the {room} that a context of {context_length} less rollout.max_tokens={max_tokens} leaves"
