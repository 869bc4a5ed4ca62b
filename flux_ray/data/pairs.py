"""Preference pairs: two responses to one prompt, the better one first.

Takes:  a data file with chosen and rejected (replies to a prompt, chats, or whole transcripts), maybe a margin.
Gives:  PairSource: `batch(step, size)`, a pure function of seed and step; `all()`; how many rows were left out, why.
Knows:  an empty reply, or two equal ones, are no preference: the row is left out and counted. One without a common
        prompt, or longer than the context, is a bad row.
Keeps:  the tokens of every pair.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, SupportsFloat

import numpy as np

from flux_ray.config import DataConfig, OnPairs
from flux_ray.data.chat import checked_messages, row_kwargs
from flux_ray.data.encode import checked_text, prompt_text
from flux_ray.data.examples import Example, Limits, as_example, check_examples, encode_examples
from flux_ray.data.forms import MESSAGES, as_chat
from flux_ray.data.order import EpochOrder, MixedOrder
from flux_ray.data.preferences import CHOSEN, REJECTED, shared_prompt, warning_of_repeats
from flux_ray.data.rows import BadCell, BadRows, Row, Rows
from flux_ray.data.sets import EVAL, TRAIN, LoadedSet, read_sets
from flux_ray.data.tokens import Tokens
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model.vocabulary import vocabulary_size
from flux_ray.records import PreferencePair, Sample

EMPTY, IDENTICAL, BAD = "empty", "identical", "bad"  # why a row is left out


class _NoPair(Exception):
    """The row is well formed and holds no preference; `cause` is EMPTY or IDENTICAL."""

    def __init__(self, cause: str) -> None:
        self.cause = cause


class StoredPairs(Sequence[PreferencePair]):
    """Pairs in four arrays: a record of a million pairs each would take twice as much as their tokens.

    >>> pairs = StoredPairs.of([PreferencePair(4, 1, np.array([5, 6], np.int32), np.array([5, 7, 2], np.int32), 0.5)])
    >>> pairs[0].rejected_ids.tolist(), pairs[0].margin, len(pairs), pairs.longest
    ([5, 7, 2], 0.5, 1, 3)
    """

    def __init__(self, tokens: Tokens, rows: np.ndarray, prompt_lengths: np.ndarray, margins: np.ndarray) -> None:
        """`tokens`: chosen, rejected, chosen, rejected …"""
        self._tokens, self._rows, self._prompt_lengths, self._margins = tokens, rows, prompt_lengths, margins

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair]) -> StoredPairs:
        tokens = Tokens.of([ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
        return cls(tokens, np.array([pair.row for pair in pairs], np.int64),
                   np.array([pair.prompt_length for pair in pairs], np.int32),
                   np.array([pair.margin for pair in pairs], np.float64))

    @classmethod
    def joined(cls, parts: Sequence[StoredPairs]) -> StoredPairs:
        return cls(Tokens.joined([part._tokens for part in parts]), np.concatenate([part._rows for part in parts]),
                   np.concatenate([part._prompt_lengths for part in parts]),
                   np.concatenate([part._margins for part in parts]))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        return int(self._tokens.lengths.max())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return PreferencePair(int(self._rows[place]), int(self._prompt_lengths[place]), self._tokens[2 * place],
                              self._tokens[2 * place + 1], float(self._margins[place]))


class PairSource:
    """Pairs by step: `source.batch(0, 64)`, `source.batch(1, 64)` … without end, epoch after epoch.

    source: the file's name; num_rows: pairs in use; skipped: cause ► rows left out, num_skipped: all of them;
    longest: tokens of the longest prompt with its response; has_margins: whether a margin column is there.
    """

    def __init__(
        self, sets: Sequence[LoadedSet[OnPairs]], config: OnPairs, tokenizer: Tokenizer, *, context_length: int,
        shuffle: bool,
    ) -> None:
        check_examples(tokenizer, config.data)
        self.source, self.skipped = ", ".join(one.rows.source for one in sets), Counter[str]()
        self._warnings = [line for one in sets for line in warning_of_repeats(
            one.rows, one.data_set.config.data.prompt_column, CHOSEN, REJECTED)]
        self.has_margins = any(one.data_set.config.data.margin_column in one.rows.columns for one in sets)
        parts = [StoredPairs.of(self._load(one, tokenizer, context_length)) for one in sets]
        self._pairs = StoredPairs.joined(parts)
        self.sizes = {one.data_set.name: len(part) for one, part in zip(sets, parts, strict=True)}   # set ► pairs
        self.num_skipped = self.skipped.total()
        self.num_rows = len(self._pairs)
        self.longest = self._pairs.longest
        orders = [EpochOrder(size, seed=config.seed, shuffle=shuffle, name=name) for name, size in self.sizes.items()]
        self._order = MixedOrder(orders, [one.data_set.weight for one in sets], seed=config.seed, shuffle=shuffle)

    def _load(self, loaded: LoadedSet[OnPairs], tokenizer: Tokenizer, context_length: int) -> list[PreferencePair]:
        """The pairs of one set. UserError where none is left."""
        rows, config = loaded.rows, loaded.data_set.config
        _require_pairs(rows, config.algo.name)
        skipped = Counter({BAD: rows.num_broken})
        bad = BadRows(rows, CHOSEN, config.data.on_bad_row)
        texts: dict[int, tuple[Example, Example]] = {}
        margins: dict[int, float] = {}
        for number, row in enumerate(rows.rows):
            try:
                texts[number] = _read(row, config.data, tokenizer)
                margins[number] = _margin(row.get(config.data.margin_column), config.data.margin_column)
            except _NoPair as none:
                texts.pop(number, None)
                skipped[none.cause] += 1
            except BadCell as error:
                texts.pop(number, None)
                bad.add(number, error)
        each = [pair for both in texts.values() for pair in both]
        samples = encode_examples(tokenizer, each, model_path=config.model.path)
        limits = Limits(context_length, vocabulary_size(config.model.path))
        found: list[PreferencePair] = []
        for number in texts:
            try:
                both = next(samples), next(samples)
                limits.check(both, tokenizer)
                found.append(_pair(int(rows.numbers[number]) - 1, *both, margins[number]))
            except _NoPair as none:
                skipped[none.cause] += 1
            except BadCell as error:
                bad.add(number, error)
        skipped[BAD] += bad.report()
        self.skipped.update(skipped)
        if not found:
            raise UserError(f"{rows.source}: no pair is left: {_counts(skipped)}")
        return found

    @classmethod
    def from_config(
        cls, config: OnPairs, tokenizer: Tokenizer, *, context_length: int, rows: list[Row] | str | None = None
    ) -> PairSource:
        """The pairs of `data.train`, or `rows` (a path or dicts). UserError says what is wrong, and where."""
        sets = read_sets(config, TRAIN, rows)
        return cls(sets, config, tokenizer, context_length=context_length, shuffle=config.data.shuffle)

    @classmethod
    def for_eval(
        cls, config: OnPairs, tokenizer: Tokenizer, *, context_length: int, rows: list[Row] | str | None = None
    ) -> PairSource:
        """The pairs of `eval.data`, or `rows`, in the file's order."""
        return cls(read_sets(config, EVAL, rows), config, tokenizer, context_length=context_length, shuffle=False)

    def batch(self, step: int, size: int) -> list[PreferencePair]:
        """The `size` pairs of step `step` (from 0)."""
        return [self._pairs[self._order.row(position)] for position in range(step * size, (step + 1) * size)]

    def all(self) -> list[PreferencePair]:
        """Every pair once, in the file's order."""
        return list(self._pairs)

    def warnings(self) -> list[str]:
        """What was left out, and what may be a mistake, in a line each."""
        left_out = [f"{self.source}: pairs left out: {_counts(self.skipped)}"] if self.num_skipped else []
        return [*left_out, *self._warnings]


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in sorted(skipped.items()) if count)


def _require_pairs(rows: Rows, algorithm: str) -> None:
    missing = [column for column in (CHOSEN, REJECTED) if column not in rows.columns]
    if missing:
        raise UserError(
            f"{rows.source}: algo.name={algorithm} learns from preference pairs: no column "
            f"{' and no column '.join(map(repr, missing))} (columns: {', '.join(rows.columns)})"
        )


def _read(row: Row, data: DataConfig, tokenizer: Tokenizer) -> tuple[Example, Example]:
    """The chosen and the rejected response after their prompt, as text."""
    if row[CHOSEN] is not None and row[CHOSEN] == row[REJECTED]:
        raise _NoPair(IDENTICAL)
    prompt, *replies = _parts(row, data)
    if not all(reply.strip() for reply in replies):
        raise _NoPair(EMPTY)
    text = prompt_text({**row, data.prompt_column: prompt}, data)
    chosen, rejected = (as_example(text, reply, tokenizer, row_kwargs(row, data)) for reply in replies)
    return chosen, rejected


def _parts(row: Row, data: DataConfig) -> tuple[object, str, str]:
    """Prompt, chosen and rejected reply. A chat that begins before its reply brings its own prompt."""
    chosen, rejected = as_chat(row[CHOSEN]), as_chat(row[REJECTED])
    whole_chats = all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected))
    prompt = row.get(data.prompt_column)
    prompt = row.get(MESSAGES) if prompt is None else prompt
    if prompt is not None and not whole_chats:
        return prompt, _reply(chosen, CHOSEN), _reply(rejected, REJECTED)
    if isinstance(chosen, list):
        checked_messages(chosen)
    shared = shared_prompt({**row, CHOSEN: chosen, REJECTED: rejected})
    if isinstance(shared, str):
        assert isinstance(chosen, str) and isinstance(rejected, str)
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    assert isinstance(chosen, list) and isinstance(rejected, list)
    return shared, _reply(chosen[len(shared) :], CHOSEN), _reply(rejected[len(shared) :], REJECTED)


def _reply(value: object, column: str) -> str:
    """The text of a reply, maybe empty: a text, or a list of one message of the assistant's."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return checked_text(value)  # which says what it is
    try:
        messages = checked_messages(value)
    except BadCell as error:
        raise BadCell(str(error), column) from error
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadCell("after what both share, one message of the assistant's must follow, and no other", column)
    return messages[0]["content"]


def _margin(value: object, column: str) -> float:
    if value is None:
        return 0.0
    margin = math.nan
    if isinstance(value, (str, SupportsFloat)) and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            margin = float(value)
    if not math.isfinite(margin):
        raise BadCell(f"must be a finite number, got {value!r:.60}", column)
    return margin


def _pair(row: int, chosen: Sample, rejected: Sample, margin: float) -> PreferencePair:
    if np.array_equal(chosen.token_ids, rejected.token_ids):
        raise _NoPair(IDENTICAL)  # the tokenizer sees no difference between the texts
    prompt_length = int(chosen.loss_mask.argmax())
    return PreferencePair(row, prompt_length, chosen.token_ids, rejected.token_ids, margin)
