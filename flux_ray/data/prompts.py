"""The stream of prompts of a run.

Takes:  a data file (or prompts in memory), a tokenizer, the context's length in tokens.
Gives:  PromptSource: `prompt(uid)`, a pure function of seed and uid, so a position to save is the next uid.
Knows:  every row is encoded at start, so that a bad or too long one is refused before anything starts; preference
        rows (chosen, rejected) without a prompt column have the prompt that both share.
Keeps:  the rows and their tokens.
Never:  draws at random: order and seeds are hashes of the run's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flux_ray.config import PolicyGradientConfig
from flux_ray.data.chat import render, require_template
from flux_ray.data.encode import Text, encode_prompts, prompt_limit, prompt_text
from flux_ray.data.order import EpochOrder, stable_seed
from flux_ray.data.preferences import CHOSEN, REJECTED, shared_prompt
from flux_ray.data.rows import BadCell, BadRows, Row, Rows, load_rows
from flux_ray.errors import UserError
from flux_ray.records import Prompt

Prompts = str | Sequence[str] | Sequence[Row]  # what a user may give: a path or a hub name, texts, or rows

TRAIN, EVAL = "train", "eval"


class PromptSource:
    """Prompts by uid: `source.prompt(0)`, `source.prompt(1)` … without end, epoch after epoch.

    source: the file's name; num_rows: rows in use; num_skipped: bad rows left out (data.on_bad_row=skip);
    columns: the names that rewards can get; longest_prompt: in tokens.
    """

    def __init__(
        self, rows: Rows, config: PolicyGradientConfig, tokenizer: Any, *, context_length: int, role: str,
    ) -> None:
        column = config.data.prompt_column
        shared = column not in rows.columns and {CHOSEN, REJECTED} <= set(rows.columns)
        if not shared:
            rows.require(column, "data.prompt_column")
        bad = BadRows(rows, column, config.data.on_bad_row)
        texts: dict[int, Text] = {}
        written: dict[int, tuple[str, bool]] = {}  # what the tokenizer gets, and whether the template wrote it
        for number, row in enumerate(rows.rows):
            try:
                text = prompt_text({**row, column: shared_prompt(row)} if shared else row, config.data)
                if isinstance(text, str):
                    written[number] = text, False
                else:
                    require_template(tokenizer, f"{rows.source} row {rows.numbers[number]} (from 1) is a chat")
                    written[number] = render(tokenizer, text), True
                texts[number] = text
            except BadCell as error:
                bad.add(number, error)
        limit, reason = prompt_limit(config, context_length)
        token_ids = dict(zip(written, encode_prompts(tokenizer, list(written.values())), strict=True))
        for number, ids in token_ids.items():
            if not 0 < len(ids) <= limit:
                bad.add(number, BadCell(f"{len(ids)} tokens, {reason}" if len(ids) else "no token"))

        self.num_skipped = bad.report() + rows.num_broken
        self.source = rows.source
        self.columns = frozenset(rows.columns) - {column}
        self._kept = [number for number, ids in token_ids.items() if 0 < len(ids) <= limit]
        self.num_rows = len(self._kept)
        self.longest_prompt = max(len(token_ids[number]) for number in self._kept)
        self._texts, self._token_ids, self._rows, self._numbers = texts, token_ids, rows.rows, rows.numbers
        self._role, self._seed = role, config.seed
        self._num_samples = config.eval.num_samples if role == EVAL else config.rollout.group_size
        shuffle = config.data.shuffle and role == TRAIN
        self._order = EpochOrder(self.num_rows, seed=config.seed, shuffle=shuffle)

    @classmethod
    def from_config(
        cls, config: PolicyGradientConfig, tokenizer: Any, *, context_length: int, prompts: Prompts | None = None
    ) -> PromptSource:
        """The prompts to train on: `data.train`, or `prompts` in its place. UserError says what is wrong, and where."""
        data = config.data
        rows = _load(prompts, data.train, "data.train", config, split=data.split, max_rows=data.max_rows)
        return cls(rows, config, tokenizer, context_length=context_length, role=TRAIN)

    @classmethod
    def for_eval(
        cls, config: PolicyGradientConfig, tokenizer: Any, *, context_length: int, prompts: Prompts | None = None
    ) -> PromptSource:
        """The prompts to evaluate on: `eval.data`, or `prompts`; in the file's order, with the same seeds each time."""
        split, max_rows = config.eval.split, config.eval.max_rows
        rows = _load(prompts, config.eval.data, "eval.data", config, split=split, max_rows=max_rows)
        return cls(rows, config, tokenizer, context_length=context_length, role=EVAL)

    def column(self, name: str) -> list[Any]:
        """The cells of a column, of the rows in use."""
        return [self._rows[row][name] for row in self._kept]

    def prompt(self, uid: int) -> Prompt:
        """The prompt at position `uid` (from 0) of the run: always the same, in whatever order they are asked for."""
        row = self._kept[self._order.row(uid)]
        token_ids = self._token_ids[row]
        columns = {name: value for name, value in self._rows[row].items() if name in self.columns}
        seed = stable_seed(self._seed, self._role, uid)
        place = self._numbers[row] - 1
        return Prompt(uid, place, self._texts[row], token_ids, columns, self._num_samples, seed)


def _load(prompts: Prompts | None, path: str | None, key: str, config: PolicyGradientConfig, **of_hub: Any) -> Rows:
    source = prompts if prompts is not None else path
    if source is None:
        raise UserError(f"{key} is not set: name a .jsonl, .json, .csv or .parquet file, or a hub data set")
    return load_rows(source, column=config.data.prompt_column, on_bad_row=config.data.on_bad_row, **of_hub)
