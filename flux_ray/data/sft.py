"""Supervised samples: what to learn by next-token prediction.

Takes:  a data file with prompts and completions, chat messages, or plain text; a tokenizer, the context's length.
Gives:  SftSource: `batch(step, size)`, a pure function of seed and step; Samples with a mask and zero loss weights.
Knows:  the loss lies on the completion and on the end token after it, which is what a policy samples.
Keeps:  the tokens of every row.
Never:  weighs the loss: the aggregation (`loss_weights`) belongs to the batch, which the trainer knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_ray.config import DataConfig, SFTConfig
from flux_ray.data.chat import checked_messages, render, require_template, with_system
from flux_ray.data.encode import Text, checked_text, encode, prompt_text
from flux_ray.data.order import EpochOrder
from flux_ray.data.preferences import CHOSEN, REJECTED
from flux_ray.data.rows import BadCell, BadRows, Row, Rows, load_rows
from flux_ray.errors import UserError
from flux_ray.model.stops import stop_token_ids
from flux_ray.records import Sample

MESSAGES_COLUMN, TEXT_COLUMN = "messages", "text"


class SftSource:
    """Samples by step: `source.batch(0, 128)`, `source.batch(1, 128)` … without end, epoch after epoch.

    What is learned is told by the columns, in this order: the completion column (after the prompt column); `messages`
    (the last one, which must be the assistant's, after the others); `text` (all of it).
    num_rows, num_skipped, source: as for PromptSource.
    """

    def __init__(self, rows: Rows, config: SFTConfig, tokenizer: Any, *, context_length: int, shuffle: bool) -> None:
        column, read = _reader(rows, config)
        bad = BadRows(rows, column, config.data.on_bad_row)
        pairs: dict[int, Example] = {}
        for number, row in enumerate(rows.rows):
            try:
                pairs[number] = as_example(*read(row), tokenizer)
            except BadCell as error:
                bad.add(number, error)
        self._samples = []
        encoded = encode_examples(tokenizer, list(pairs.values()), model_path=config.model.path)
        for number, sample in zip(pairs, encoded, strict=True):
            if sample.num_tokens > context_length:
                bad.add(number, BadCell(f"{sample.num_tokens} tokens, more than the context of {context_length}"))
            else:
                self._samples.append(sample)
        self.num_skipped = bad.report() + rows.num_broken
        self.source = rows.source
        self.num_rows = len(self._samples)
        self._order = EpochOrder(self.num_rows, seed=config.seed, shuffle=shuffle)

    @classmethod
    def from_config(
        cls, config: SFTConfig, tokenizer: Any, *, context_length: int, rows: list[Row] | str | None = None
    ) -> SftSource:
        """The rows of `data.train`, or `rows` (a path or dicts). UserError says what is wrong, and where."""
        data = config.data
        loaded = _load(rows, data.train, "data.train", config, split=data.split, max_rows=data.max_rows)
        return cls(loaded, config, tokenizer, context_length=context_length, shuffle=data.shuffle)

    @classmethod
    def for_eval(
        cls, config: SFTConfig, tokenizer: Any, *, context_length: int, rows: list[Row] | str | None = None
    ) -> SftSource:
        """The rows of `eval.data`, or `rows`, in the file's order."""
        split, max_rows = config.eval.split, config.eval.max_rows
        loaded = _load(rows, config.eval.data, "eval.data", config, split=split, max_rows=max_rows)
        return cls(loaded, config, tokenizer, context_length=context_length, shuffle=False)

    def batch(self, step: int, size: int) -> list[Sample]:
        """The `size` samples of step `step` (from 0)."""
        return [self._samples[self._order.row(position)] for position in range(step * size, (step + 1) * size)]

    def all(self) -> list[Sample]:
        """Every sample once, in the file's order."""
        return list(self._samples)

    def warnings(self) -> list[str]:
        """What was left out, in a line."""
        bad = self.num_skipped
        return [f"{self.source}: {bad} bad rows skipped (data.on_bad_row=skip)"] if bad else []


def _load(rows: list[Row] | str | None, path: str | None, key: str, config: SFTConfig, **of_hub: Any) -> Rows:
    source = rows if rows is not None else path
    if source is None:
        raise UserError(f"{key} is not set: name a .jsonl, .json, .csv or .parquet file, or a hub data set")
    return load_rows(source, column=TEXT_COLUMN, on_bad_row=config.data.on_bad_row, **of_hub)


@dataclass(frozen=True)
class Example:
    """The text before the loss and the text under it."""

    prompt: str       # empty for plain text, which is learned from its first token on
    completion: str
    is_chat: bool     # the template has written the special tokens; what follows its end token is no response


def as_example(prompt: Text, completion: str, tokenizer: Any) -> Example:
    """The texts before and under the loss; a chat as its template writes it. BadCell: the template refuses it."""
    if isinstance(prompt, str):
        return Example(prompt, completion, is_chat=False)
    require_template(tokenizer, "the data are chats")
    before = render(tokenizer, prompt)
    after = render(tokenizer, [*prompt, {"role": "assistant", "content": completion}], whole=True)
    if not after.startswith(before):
        raise BadCell("the chat template writes the prompt in another way once it is answered: use plain text columns")
    return Example(before, after[len(before) :], is_chat=True)


def encode_examples(tokenizer: Any, pairs: list[Example], *, model_path: str | None) -> list[Sample]:
    """Samples of the pairs: prompt and completion encoded each by itself, as in a rollout, then the end token.

    A chat ends where a rollout of this model does: at the first token that ends a response.
    """
    stops = stop_token_ids(model_path, tokenizer)
    end = tokenizer.eos_token_id
    assert end is not None, "a policy ends its responses with an end token"
    plain = iter(encode(tokenizer, [pair.prompt for pair in pairs if not pair.is_chat], special=True))
    chats = iter(encode(tokenizer, [pair.prompt for pair in pairs if pair.is_chat], special=False))
    completions = encode(tokenizer, [pair.completion for pair in pairs], special=False)
    samples = []
    for pair, completion in zip(pairs, completions, strict=True):
        prompt = next(chats if pair.is_chat else plain)
        ends = np.flatnonzero(np.isin(completion, stops))
        if pair.is_chat and len(ends):
            completion = completion[: ends[0] + 1]
        elif not len(completion) or completion[-1] != end:
            completion = np.append(completion, np.int32(end))
        token_ids = np.concatenate([prompt, completion]).astype(np.int32)
        loss_mask = np.arange(len(token_ids)) >= max(len(prompt), 1)  # nothing comes before the first token
        samples.append(Sample(token_ids, loss_mask, np.zeros(len(token_ids), np.float32)))
    return samples


def _reader(rows: Rows, config: SFTConfig) -> tuple[str, Callable[[Row], tuple[Text, str]]]:
    """The column that errors name, and what makes (prompt, completion) of a row."""
    data = config.data
    if data.completion_column in rows.columns:
        rows.require(data.prompt_column, "data.prompt_column")
        return data.completion_column, lambda row: (_prompt(row, data), completion_text(row[data.completion_column]))
    if MESSAGES_COLUMN in rows.columns:
        return MESSAGES_COLUMN, lambda row: _last_turn(row[MESSAGES_COLUMN], data.system_prompt)
    if TEXT_COLUMN in rows.columns:
        return TEXT_COLUMN, lambda row: ("", checked_text(row[TEXT_COLUMN]))
    if {CHOSEN, REJECTED} <= set(rows.columns):
        raise UserError(f"{rows.source}: preference pairs ({CHOSEN}, {REJECTED}) are for algo=dpo, ipo, cdpo or "
                        f"reward_model: algo.name={config.algo.name} learns completions")
    raise UserError(
        f"{rows.source}: nothing to learn from: no column {data.completion_column!r} (data.completion_column), "
        f"{MESSAGES_COLUMN!r} or {TEXT_COLUMN!r} (columns: {', '.join(rows.columns)})"
    )


def _prompt(row: Row, data: DataConfig) -> Text:
    try:
        return prompt_text(row, data)
    except BadCell as error:
        raise BadCell(str(error), column=data.prompt_column) from error


def completion_text(value: Any) -> str:
    """The completion's text; a list of one assistant message is its content."""
    if not isinstance(value, list):
        return checked_text(value)
    messages = checked_messages(value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadCell("a completion of messages must be one message of the assistant's")
    return messages[0]["content"]


def _last_turn(value: Any, system_prompt: str | None) -> tuple[Text, str]:
    if not isinstance(value, list):
        raise BadCell(f"must be a list of messages, got {type(value).__name__}")
    messages = checked_messages(value)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise BadCell("the last of at least two messages must be the assistant's")
    return with_system(messages[:-1], system_prompt), messages[-1]["content"]
