"""Supervised samples: what to learn by next-token prediction.

Takes:  data sets with prompts and completions, chat messages, or plain text; a tokenizer, the context's length.
Gives:  SftSource: `batch(step, size)`, a pure function of seed and step; Samples with a mask and zero loss weights.
Knows:  the loss lies on the completion and on the end token after it, which is what a policy samples.
Keeps:  the tokens of every row, in one array.
Never:  weighs the loss: the aggregation (`loss_weights`) belongs to the batch, which the trainer knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flux_ray.config import DataConfig, ExampleDataConfig, SFTConfig
from flux_ray.data.chat import checked_messages, row_kwargs, with_system
from flux_ray.data.encode import Text, checked_text, prompt_text
from flux_ray.data.examples import Example, Limits, as_example, check_examples, encode_examples, turns
from flux_ray.data.forms import MESSAGES, as_chat
from flux_ray.data.order import EpochOrder, MixedOrder
from flux_ray.data.preferences import CHOSEN, REJECTED, warning_of_repeats
from flux_ray.data.rows import BadCell, BadRows, Row, Rows
from flux_ray.data.sets import EVAL, TRAIN, LoadedSet, read_sets
from flux_ray.data.tokens import Tokens
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model.vocabulary import vocabulary_size
from flux_ray.records import Sample

TEXT_COLUMN = "text"
ALL = "all"  # data.learn_turns: every turn of the assistant's


class SftSource:
    """Samples by step: `source.batch(0, 128)`, `source.batch(1, 128)` … without end, epoch after epoch.

    The first of these columns that is there is learned: the completion column (after the prompt column); `messages`
    (its last message, which must be the assistant's, after the others; data.learn_turns=all: each of the assistant's);
    `text` (all of it).
    num_rows: samples; num_skipped: bad rows left out; source: as for PromptSource.
    """

    def __init__(
        self, sets: Sequence[LoadedSet[SFTConfig]], config: SFTConfig, tokenizer: Tokenizer, *, context_length: int,
        shuffle: bool,
    ) -> None:
        check_examples(tokenizer, config.data)
        read = [_Samples(loaded, tokenizer, context_length=context_length) for loaded in sets]
        self._tokens = Tokens.joined([one.tokens for one in read])
        self._learned = np.concatenate([one.learned for one in read])
        self._ends = np.cumsum(self._tokens.lengths)
        self.num_skipped = sum(one.num_skipped for one in read)
        self._warnings = [line for one in read for line in one.warnings]
        self.sizes = {one.name: len(one.tokens) for one in read}   # set ► samples
        self.source = ", ".join(loaded.rows.source for loaded in sets)
        self.num_rows = len(self._tokens)
        orders = [EpochOrder(len(one.tokens), seed=config.seed, shuffle=shuffle, name=one.name) for one in read]
        weights = [loaded.data_set.weight for loaded in sets]
        self._order = MixedOrder(orders, weights, seed=config.seed, shuffle=shuffle)

    @classmethod
    def from_config(
        cls, config: SFTConfig, tokenizer: Tokenizer, *, context_length: int, rows: list[Row] | str | None = None
    ) -> SftSource:
        """The rows of `data.train`, or `rows` (a path or dicts). UserError says what is wrong, and where."""
        sets = read_sets(config, TRAIN, rows, column=TEXT_COLUMN)
        return cls(sets, config, tokenizer, context_length=context_length, shuffle=config.data.shuffle)

    @classmethod
    def for_eval(
        cls, config: SFTConfig, tokenizer: Tokenizer, *, context_length: int, rows: list[Row] | str | None = None
    ) -> SftSource:
        """The rows of `eval.data`, or `rows`, in the file's order."""
        sets = read_sets(config, EVAL, rows, column=TEXT_COLUMN)
        return cls(sets, config, tokenizer, context_length=context_length, shuffle=False)

    def batch(self, step: int, size: int) -> list[Sample]:
        """The `size` samples of step `step` (from 0)."""
        return [self._sample(self._order.row(position)) for position in range(step * size, (step + 1) * size)]

    def all(self) -> list[Sample]:
        """Every sample once, set after set, in the file's order."""
        return [self._sample(number) for number in range(self.num_rows)]

    def _sample(self, number: int) -> Sample:
        token_ids, end = self._tokens[number], self._ends[number]
        learned = self._learned[end - len(token_ids) : end]
        return Sample(token_ids, learned, np.zeros(len(token_ids), np.float32))

    def warnings(self) -> list[str]:
        """What was left out, and what may be a mistake, in a line each."""
        bad = self.num_skipped
        skipped = [f"{self.source}: {bad} bad rows skipped (data.on_bad_row=skip)"] if bad else []
        return [*skipped, *self._warnings]


class _Samples:
    """The samples of one set: their tokens, and which of all these are learned."""

    def __init__(self, loaded: LoadedSet[SFTConfig], tokenizer: Tokenizer, *, context_length: int) -> None:
        self._rows, self.name, config = loaded.rows, loaded.data_set.name, loaded.data_set.config
        column, self._read = _reader(self._rows, config.data, tokenizer)
        self.warnings = warning_of_repeats(self._rows, config.data.prompt_column, config.data.completion_column)
        self._bad = BadRows(self._rows, column, config.data.on_bad_row)
        self._of_row: list[int] = []   # the row of each sample
        limits = Limits(context_length, vocabulary_size(config.model.path))
        ids, masks = [], []
        for sample, number in zip(encode_examples(tokenizer, self._examples(), model_path=config.model.path),
                                  _counted(self._of_row), strict=False):
            try:
                limits.check([sample], tokenizer)
            except BadCell as error:
                self._bad.add(number, error)
                continue
            ids.append(sample.token_ids)
            masks.append(sample.loss_mask)
        self.num_skipped = self._bad.report() + self._rows.num_broken
        if not ids:
            raise UserError(f"{self._rows.source}: no sample is left")
        self.tokens, self.learned = Tokens.of(ids), np.concatenate(masks)

    def _examples(self) -> Iterator[Example]:
        for number, row in enumerate(self._rows.rows):
            try:
                examples = self._read(row)
            except BadCell as error:
                self._bad.add(number, error)
                continue
            self._of_row += [number] * len(examples)
            yield from examples


def _counted(numbers: list[int]) -> Iterable[int]:
    """The items of a list that grows while it is read."""
    place = 0
    while True:
        yield numbers[place]
        place += 1


def _reader(rows: Rows, data: ExampleDataConfig, tokenizer: Tokenizer) -> tuple[str, Callable[[Row], list[Example]]]:
    """The column that errors name, and what makes the examples of a row."""
    if data.completion_column in rows.columns:
        rows.require(data.prompt_column, "data.prompt_column")
        return data.completion_column, lambda row: [
            as_example(_prompt(row, data), completion_text(row[data.completion_column]), tokenizer,
                       row_kwargs(row, data))]
    if MESSAGES in rows.columns:
        return MESSAGES, lambda row: turns(_messages(row[MESSAGES], data), tokenizer, row_kwargs(row, data),
                                           every=data.learn_turns == ALL)
    if TEXT_COLUMN in rows.columns:
        return TEXT_COLUMN, lambda row: [Example.of_text(checked_text(row[TEXT_COLUMN]))]
    if {CHOSEN, REJECTED} <= set(rows.columns):
        raise UserError(f"{rows.source}: preference pairs ({CHOSEN}, {REJECTED}) are for algo=dpo, ipo, cdpo or "
                        "reward_model: algo.name=sft learns completions")
    raise UserError(
        f"{rows.source}: nothing to learn from: no column {data.completion_column!r} (data.completion_column), "
        f"{MESSAGES!r} or {TEXT_COLUMN!r} (columns: {', '.join(rows.columns)})"
    )


def _prompt(row: Row, data: DataConfig) -> Text:
    try:
        return prompt_text(row, data)
    except BadCell as error:
        raise BadCell(str(error), column=data.prompt_column) from error


def completion_text(value: object) -> str:
    """The completion's text; a message of the assistant's, alone or in a list, is its content."""
    value = as_chat(value)
    if not isinstance(value, list):
        return checked_text(value)
    messages = checked_messages(value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadCell("a completion of messages must be one message of the assistant's")
    return checked_text(messages[0]["content"])


def _messages(value: object, data: DataConfig) -> list[dict[str, object]]:
    value = as_chat(value)
    if not isinstance(value, list):
        raise BadCell(f"must be a list of messages, got {type(value).__name__}")
    return with_system(checked_messages(value), data.system_prompt)
