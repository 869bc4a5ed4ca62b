"""The forms that rows come in, brought into one.

Takes:  Rows as a file has them, the config of their set.
Gives:  `shaped`: the same with the columns that the config names, where another form has them under other names.
Knows:  columns by dots; instruction, input, output; ShareGPT's conversations of {from, value}.
Never:  replaces a column that is there.
"""

from __future__ import annotations

import ast
import json
import re
from functools import partial

from flux_ray.config import DataConfig, ExampleDataConfig
from flux_ray.data.rows import Row, Rows

#: The options that name columns: an objective has some of them.
COLUMNS = ("prompt_column", "completion_column", "answer_column", "margin_column", "pass_rate_column")
MESSAGES = "messages"
CONVERSATIONS = ("conversations", "conversation")  # of messages, in either form
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
SYSTEM = "system"  # beside conversations: the system message
LIST_OF_MAPPINGS = re.compile(r"\s*\[\s*\{")
BETWEEN = "\n\n"  # instruction and input

#: ShareGPT's name of who speaks ► a chat's role.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bot": "assistant",
         "model": "assistant", "observation": "tool"}


def shaped(rows: Rows, data: DataConfig) -> Rows:
    """The rows with every column that the config names or that a form of rows gives, made where it is asked for."""
    for name in COLUMNS:
        rows = rows.reaching(getattr(data, name, ""))
    if MESSAGES not in rows.columns:
        for name in [name for name in CONVERSATIONS if name in rows.columns][:1]:  # the first that is there
            rows = rows.having(**{MESSAGES: partial(_conversation, column=name)})
    if INSTRUCTION in rows.columns and data.prompt_column not in rows.columns:
        rows = rows.having(**{data.prompt_column: _instruction})
        column = data.completion_column if isinstance(data, ExampleDataConfig) else OUTPUT
        if OUTPUT in rows.columns and column not in rows.columns:
            rows = rows.having(**{column: lambda row: row[OUTPUT]})
    return rows


def _instruction(row: Row) -> object:
    instruction, given = row[INSTRUCTION], row.get(INPUT)
    if isinstance(instruction, str) and isinstance(given, str) and given.strip():
        return f"{instruction}{BETWEEN}{given}"
    return instruction


def _conversation(row: Row, column: str) -> object:
    """The messages of a conversation, under the system message that lies beside them."""
    messages, system = as_chat(row[column]), row.get(SYSTEM)
    if isinstance(messages, list) and isinstance(system, str) and system.strip() and _first_role(messages) != SYSTEM:
        return [{"role": SYSTEM, "content": system}, *messages]
    return messages


def _first_role(messages: list[object]) -> object:
    return messages[0].get("role") if messages and isinstance(messages[0], dict) else None


def parsed(value: object) -> object:
    """A text that is a list of mappings, as tables of text hold one (JSON's or Python's), as that list.

    >>> parsed("[{'role': 'user', 'content': 'hi'}]"), parsed("[1] and [2]")
    ([{'role': 'user', 'content': 'hi'}], '[1] and [2]')
    """
    if not isinstance(value, str) or not LIST_OF_MAPPINGS.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return value


def as_chat(value: object) -> object:
    """A cell with ShareGPT's messages as a chat's; a message alone as a list of it; anything else as it is.

    Content in parts becomes one text. Fields that are None, as tables fill them in, are left out at any depth.

    >>> as_chat([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello", "tool_calls": None}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    found = parsed(value)
    if isinstance(found, list) and all(map(_is_message, found)):
        value = found
    messages = [value] if _is_message(value) else value
    return [_as_message(message) for message in messages] if isinstance(messages, list) else messages


def _as_message(message: object) -> object:
    if not isinstance(message, dict):
        return message
    if _is_sharegpt(message):
        message = {"role": message["from"], "content": message["value"]}
    role = message.get("role")
    if isinstance(role, str) and role in ROLES:
        message = {**message, "role": ROLES[role]}
    given = {name: without_none(value) for name, value in message.items()
             if value is not None or name in ("role", "content")}
    parts = given.get("content")
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        given["content"] = "".join(part["text"] for part in parts)
    return given


def without_none(value: object) -> object:
    """Without the fields that are None, at any depth: tables give every row's calls of tools the fields of all.

    >>> without_none([{"name": "add", "arguments": {"a": 1, "city": None}}])
    [{'name': 'add', 'arguments': {'a': 1}}]
    """
    if isinstance(value, dict):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_sharegpt(message: dict[str, object]) -> bool:
    return {"from", "value"} <= message.keys() and message.get("role") is None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or _is_sharegpt(value))
