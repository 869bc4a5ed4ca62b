"""Chat messages and the templates that make text of them.

Takes:  a cell of a data file, a tokenizer with a chat template.
Gives:  checked messages; the text that the model reads, with the opening of the assistant's turn at its end.
Knows:  what a message is: {"role": text, "content": text}; what a template may be given beside the messages.
Never:  writes a template of its own: a tokenizer without one is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from jinja2 import TemplateError

from flux_ray.config import DataConfig
from flux_ray.data.forms import parsed, without_none
from flux_ray.data.rows import BadCell, Row, first_line
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.records import Message

ASSISTANT = "assistant"
TOOLS, OWN_KWARGS = "tools", "chat_template_kwargs"  # columns that a template gets
OF_USERS = (TOOLS, "documents")  # arguments of apply_chat_template that users alone give


def checked_messages(value: list[object]) -> list[Message]:
    """The messages, each with a role and a text (or calls of tools). BadCell says which one isn't."""
    if not value:
        raise BadCell("an empty list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadCell(f"message {number} is {type(message).__name__}, not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) and not (key == "content" and message.get("tool_calls")):
                raise BadCell(f"message {number}: {key!r} must be text, got {type(message.get(key)).__name__}")
        messages.append(message)
    return messages


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The messages under the system prompt; a row's own system message is the nearer one and stays."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def without_reply(messages: list[Message]) -> list[Message]:
    """The messages without the assistant's at their end. BadCell where no other is left."""
    number = len(messages)
    while number and messages[number - 1]["role"] == ASSISTANT:
        number -= 1
    if not number:
        raise BadCell("no message but the assistant's")
    return messages[:number]


def require_template(tokenizer: Tokenizer, why: str) -> None:
    """UserError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{why}, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use plain text prompts, or a tokenizer with one (model.tokenizer)"
        )


def check_template_kwargs(tokenizer: Tokenizer, kwargs: Mapping[str, object]) -> None:
    """UserError for an argument that the template doesn't read, or that we set ourselves."""
    if not kwargs:
        return
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - set(OF_USERS)
    for name in kwargs:
        if name in ours:
            raise UserError(f"data.chat_template_kwargs: {name!r} is set by what the prompt is for")
        if not re.search(rf"\b{re.escape(name)}\b", str(getattr(tokenizer, "chat_template", None))):
            raise UserError(f"data.chat_template_kwargs: the tokenizer {tokenizer.name_or_path!r} has no {name!r} in "
                            "its chat template")


def row_kwargs(row: Row, data: DataConfig) -> dict[str, object]:
    """What the template gets for a row: data.chat_template_kwargs, under the row's own, and its `tools`.

    BadCell: they are no mapping, or no list.
    """
    kwargs, own, tools = dict(data.chat_template_kwargs), row.get(OWN_KWARGS), row.get(TOOLS)
    if own is not None:
        if not isinstance(own, dict):
            raise BadCell(f"must be a mapping, got {type(own).__name__}", OWN_KWARGS)
        kwargs |= {name: value for name, value in own.items() if value is not None}
    if tools:
        tools = parsed(tools)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadCell("must be a list of tools' schemas", TOOLS)
        kwargs[TOOLS] = without_none(tools)
    return kwargs


def render(tokenizer: Tokenizer, messages: list[Message], kwargs: Mapping[str, object], *, whole: bool = False) -> str:
    """The text of a chat: open for the assistant to go on, or `whole`, with the last turn closed.

    A chat whose last message is the assistant's own is gone on with, inside that message.
    BadCell: the template has no text for this chat (many refuse a system message, or two turns of one role).
    """
    going_on = not whole and messages[-1]["role"] == ASSISTANT
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not whole and not going_on,
            continue_final_message=going_on,
            **kwargs,
        )
    # TypeError: of an expression in the template. ValueError: of a turn that it drops.
    except (TemplateError, TypeError, ValueError) as error:
        raise BadCell(f"the chat template refuses it: {first_line(error)}") from error
