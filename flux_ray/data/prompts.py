"""The stream of prompts of a run.

Takes:  data sets (or prompts in memory), a tokenizer, the context's length in tokens.
Gives:  PromptSource: `prompt(uid)`, a pure function of seed and uid, so a position to save is the next uid.
Knows:  every row is encoded at start, so that a bad or too long one is refused before anything starts; preference
        rows (chosen, rejected) without a prompt column have the prompt that both share.
Keeps:  the rows and their tokens; a prompt's text is made again when it is asked for.
Never:  draws at random: order and seeds are hashes of the run's seed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from flux_ray.config import PolicyGradientConfig
from flux_ray.data.chat import check_template_kwargs, render, require_template, row_kwargs
from flux_ray.data.encode import Text, are_pairs, asked, prompt_limit
from flux_ray.data.order import UNKNOWN_RATE, EpochOrder, MixedOrder, stable_seed
from flux_ray.data.rows import BadCell, BadRows, Row
from flux_ray.data.sets import EVAL, TRAIN, LoadedSet, read_sets
from flux_ray.data.tokens import encode_starts, not_in_embedding
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model.vocabulary import vocabulary_size
from flux_ray.records import Prompt

Prompts = str | Sequence[str] | Sequence[Row]  # what a user may give: a path or a hub name, texts, or rows


class PromptSet:
    """The prompts of one set, in the file's order.

    num_rows: rows in use; num_skipped: bad rows left out (data.on_bad_row=skip); columns: the names that rewards can
    get; longest_prompt: in tokens.
    """

    def __init__(self, loaded: LoadedSet[PolicyGradientConfig], tokenizer: Tokenizer, *, context_length: int) -> None:
        rows, self.data_set, self.config = loaded.rows, loaded.data_set, loaded.data_set.config
        self._column = column = self.config.data.prompt_column
        self._pairs = are_pairs(rows, self.config.data)
        if not self._pairs:
            rows.require(column, "data.prompt_column")
        self.source, self.columns, self._rows = rows.source, frozenset(rows.columns) - {column}, rows
        self.num_without_reply = 0  # prompts of which the assistant's last message was left out
        self.num_unrated = 0  # rows without a pass rate, where a curriculum goes by it
        bad = BadRows(rows, column, self.config.data.on_bad_row)
        read = array("q")  # numbers of the rows that give a text
        tokens = encode_starts(tokenizer, self._written(tokenizer, bad, read))
        limit, reason = prompt_limit(self.config.data, self.config.rollout, context_length)
        keep = (tokens.lengths > 0) & (tokens.lengths <= limit)
        for place in np.flatnonzero(~keep).tolist():
            length = int(tokens.lengths[place])
            bad.add(read[place], BadCell(f"{length} tokens, {reason}" if length else "no token"))
        vocab_size = vocabulary_size(self.config.model.path)
        for place, token_id in tokens.beyond(vocab_size):
            bad.add(read[place], not_in_embedding(tokenizer, token_id, vocab_size or 0))
            keep[place] = False
        self.num_skipped = bad.report() + rows.num_broken
        self._tokens = tokens
        self._places = np.flatnonzero(keep)
        self._kept = np.array(read, np.int64)[self._places]
        self.num_rows = len(self._kept)
        self.longest_prompt = int(tokens.lengths[self._places].max())

    def _written(self, tokenizer: Tokenizer, bad: BadRows, read: array[int]) -> Iterator[tuple[str, bool]]:
        """What the tokenizer gets of each good row, and whether the template wrote it."""
        for number, row in enumerate(self._rows.rows):
            try:
                text, was_cut = asked(row, self.config.data, pairs=self._pairs)
                if isinstance(text, str):
                    written = text, False
                else:
                    kwargs = row_kwargs(row, self.config.data)
                    require_template(tokenizer, f"{self._rows.where(number)} is a chat")
                    check_template_kwargs(tokenizer, kwargs)
                    written = render(tokenizer, text, kwargs), True
            except BadCell as error:
                bad.add(number, error)
                continue
            read.append(number)
            self.num_without_reply += was_cut
            yield written

    def column(self, name: str) -> list[object]:
        """The cells of a column, of the rows in use."""
        return [self._rows.rows[number][name] for number in self._kept.tolist()]

    def row(self, place: int) -> tuple[int, Text, np.ndarray, dict[str, object]]:
        """Row in the file (from 0), text, tokens and columns of row `place` of those in use."""
        number = int(self._kept[place])
        row = self._rows.rows[number]
        columns = {name: value for name, value in row.items() if name in self.columns}
        text, _ = asked(row, self.config.data, pairs=self._pairs)
        token_ids = self._tokens[self._places[place]]
        return int(self._rows.numbers[number]) - 1, text, token_ids, columns

    def pass_rates(self) -> np.ndarray:
        """(num_rows,) float64, of the rows in use; UNKNOWN_RATE where a row has none.

        UserError where the column is missing or has no rate at all, or a cell is no pass rate.
        """
        name = self.config.data.pass_rate_column
        self._rows.require(name, "data.pass_rate_column")
        rates = self.column(name)
        for number, rate in zip(self._kept.tolist(), rates, strict=True):
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float))
                                     or not 0 <= rate <= 1):
                raise UserError(f"{self._rows.where(number)}: column {name!r} must be a number from 0 to 1, or null, "
                                f"got {rate!r:.60} (data.curriculum={self.config.data.curriculum} orders by it)")
        self.num_unrated = rates.count(None)
        if self.num_unrated == self.num_rows:
            raise UserError(f"{self.source}: column {name!r} holds no rate, and "
                            f"data.curriculum={self.config.data.curriculum} orders by it")
        return np.array([UNKNOWN_RATE if rate is None else rate for rate in rates], np.float64)

    def warnings(self) -> list[str]:
        """What was left out, in a line each."""
        lines = []
        if self.num_skipped:
            lines.append(f"{self.source}: {self.num_skipped} bad rows skipped (data.on_bad_row=skip)")
        if self.num_without_reply:
            lines.append(f"{self.source}: {self.num_without_reply} prompts end with a message of the assistant's, "
                         "which is left out (data.prefill=true goes on with it)")
        if self.num_unrated:
            lines.append(f"{self.source}: {self.num_unrated} of {self.num_rows} rows have no pass rate: they count as "
                         f"{UNKNOWN_RATE:g}")
        return lines


class PromptSource:
    """Prompts by uid: `source.prompt(0)`, `source.prompt(1)` … without end, epoch after epoch.

    source: the sets' names; num_rows: rows in use; columns: the names that rewards can get of every set;
    longest_prompt: in tokens.
    """

    def __init__(
        self, sets: Sequence[LoadedSet[PolicyGradientConfig]], config: PolicyGradientConfig, tokenizer: Tokenizer, *,
        context_length: int, role: str,
    ) -> None:
        self.sets = [PromptSet(loaded, tokenizer, context_length=context_length) for loaded in sets]
        self.source = ", ".join(one.source for one in self.sets)
        self.columns = frozenset.intersection(*(one.columns for one in self.sets))
        self.num_rows = sum(one.num_rows for one in self.sets)
        self.num_skipped = sum(one.num_skipped for one in self.sets)
        self.longest_prompt = max(one.longest_prompt for one in self.sets)
        self._starts = np.cumsum([0, *(one.num_rows for one in self.sets)])
        self._role, self._seed = role, config.seed
        self._num_samples = config.eval.num_samples if role == EVAL else config.rollout.group_size
        self._order = None  # every set once, in its order
        if role == TRAIN:
            self._order = _order(self.sets, seed=config.seed, shuffle=config.data.shuffle)

    @classmethod
    def from_config(
        cls, config: PolicyGradientConfig, tokenizer: Tokenizer, *, context_length: int, prompts: Prompts | None = None
    ) -> PromptSource:
        """The prompts to train on: `data.train`, or `prompts` in its place. UserError says what is wrong, and where."""
        return cls(read_sets(config, TRAIN, prompts), config, tokenizer, context_length=context_length, role=TRAIN)

    @classmethod
    def for_eval(
        cls, config: PolicyGradientConfig, tokenizer: Tokenizer, *, context_length: int, prompts: Prompts | None = None
    ) -> PromptSource:
        """The prompts to evaluate on: `eval.data`, or `prompts`; in the file's order, with the same seeds each time."""
        return cls(read_sets(config, EVAL, prompts), config, tokenizer, context_length=context_length, role=EVAL)

    def prompt(self, uid: int) -> Prompt:
        """The prompt at position `uid` (from 0) of the run: always the same, in whatever order they are asked for."""
        row = self._order.row(uid) if self._order else uid % self.num_rows
        chosen = int(np.searchsorted(self._starts, row, side="right")) - 1
        one = self.sets[chosen]
        number, text, token_ids, columns = one.row(row - int(self._starts[chosen]))
        seed = stable_seed(self._seed, self._role, uid)
        return Prompt(uid, number, text, token_ids, columns, self._num_samples, seed, one.data_set.name,
                      one.data_set.rewards, one.data_set.max_tokens)

    def warnings(self) -> list[str]:
        return [line for one in self.sets for line in one.warnings()]


def _order(sets: Sequence[PromptSet], *, seed: int, shuffle: bool) -> MixedOrder:
    orders = [EpochOrder(one.num_rows, seed=seed, shuffle=shuffle, name=one.data_set.name,
                         curriculum=_curriculum(one)) for one in sets]
    weights = [one.data_set.weight for one in sets]
    return MixedOrder(orders, weights, seed=seed, shuffle=shuffle)


def _curriculum(one: PromptSet) -> tuple[str, np.ndarray] | None:
    """The set's curriculum, and the pass rates that it goes by."""
    kind = one.config.data.curriculum
    return None if kind == "none" else (kind, one.pass_rates())
