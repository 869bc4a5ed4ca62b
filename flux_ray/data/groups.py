"""Groups that were rolled out and scored elsewhere: a prompt, its responses, their rewards.

Takes:  a data file with `responses` and `rewards` (lists of one length) beside the prompt; a tokenizer.
Gives:  GroupSource: `batch(step, size)`, a pure function of seed and step, in the records of a rollout.
Knows:  nobody recorded the sampler's log-probs: they are nan, so that any use of them shows.
Keeps:  the tokens of every group.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flux_ray.algo import filters
from flux_ray.config import DataConfig, PolicyGradientConfig
from flux_ray.data.chat import row_kwargs
from flux_ray.data.encode import prompt_text
from flux_ray.data.examples import Example, Limits, as_example, check_examples, encode_examples
from flux_ray.data.order import EpochOrder
from flux_ray.data.rows import BadCell, BadRows, Row, Rows
from flux_ray.data.sets import LoadedSet
from flux_ray.data.sft import completion_text
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model.vocabulary import vocabulary_size
from flux_ray.records import FINISH_STOP, Prompt, RolloutGroup, Sample, ScoredGroup, Trajectory

RESPONSES, REWARDS = "responses", "rewards"
NO_VERSION = -1  # of tokens that no policy of this run sampled


@dataclass(frozen=True)
class OfflineGroup:
    """A group as a rollout would have given it, and its scores."""

    group: RolloutGroup
    scored: ScoredGroup


def are_groups(rows: Rows) -> bool:
    """Whether these rows are groups: they have responses and rewards."""
    return {RESPONSES, REWARDS} <= set(rows.columns)


class GroupSource:
    """Groups by step, without end, epoch after epoch.

    source, num_rows: as for PromptSource; sizes: the numbers of responses that there are; dropped: cause ► groups that
    filter.reward left out.
    """

    def __init__(self, loaded: LoadedSet[PolicyGradientConfig], tokenizer: Tokenizer, *, context_length: int) -> None:
        rows, config = loaded.rows, loaded.data_set.config
        check_examples(tokenizer, config.data)
        rows.require(config.data.prompt_column, "data.prompt_column")
        self.source, self.dropped = rows.source, Counter[str]()
        bad = BadRows(rows, RESPONSES, config.data.on_bad_row)
        read: dict[int, tuple[list[Example], np.ndarray]] = {}
        for number, row in enumerate(rows.rows):
            try:
                read[number] = _read(row, config.data, tokenizer)
            except BadCell as error:
                bad.add(number, error)
        each = [pair for pairs, _ in read.values() for pair in pairs]
        samples = encode_examples(tokenizer, each, model_path=config.model.path)
        limits = Limits(context_length, vocabulary_size(config.model.path))
        self._groups: list[OfflineGroup] = []
        for number, (pairs, rewards_G) in read.items():
            mine = [next(samples) for _ in pairs]
            try:
                limits.check(mine, tokenizer)
            except BadCell as error:
                bad.add(number, error)
                continue
            group = _group(int(rows.numbers[number]) - 1, rows.rows[number][config.data.prompt_column], mine, rewards_G)
            cause = filters.refusal(group.scored, config.filter)
            self.dropped.update([cause] if cause else [])
            self._groups.extend([] if cause else [group])
        self._num_bad = bad.report() + rows.num_broken
        if not self._groups:
            raise UserError(f"{self.source}: no group is left: {self._counts()}")
        self.num_rows = len(self._groups)
        self.sizes = frozenset(group.scored.group_size for group in self._groups)
        self._order = EpochOrder(self.num_rows, seed=config.seed, shuffle=config.data.shuffle)

    def batch(self, step: int, size: int) -> list[OfflineGroup]:
        """The `size` groups of step `step` (from 0), each with a uid of its own in the run."""
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def warnings(self) -> list[str]:
        """What was left out, in a line."""
        return [f"{self.source}: groups left out: {self._counts()}"] if self._num_bad or self.dropped else []

    def _counts(self) -> str:
        return ", ".join(f"{count} {cause}" for cause, count in {"bad": self._num_bad, **self.dropped}.items() if count)

    def _at(self, position: int) -> OfflineGroup:
        kept = self._groups[self._order.row(position)]
        prompt = replace(kept.group.prompt, uid=position)
        return OfflineGroup(replace(kept.group, prompt=prompt), replace(kept.scored, uid=position))


def _read(row: Row, data: DataConfig, tokenizer: Tokenizer) -> tuple[list[Example], np.ndarray]:
    """The responses of a row as text after its prompt, and their rewards (G,): nan where none is given."""
    responses, rewards = _listed(row, RESPONSES), _listed(row, REWARDS)
    if len(responses) != len(rewards):
        raise BadCell(f"{len(rewards)} rewards for {len(responses)} responses", REWARDS)
    try:
        prompt = prompt_text(row, data)
    except BadCell as error:
        raise BadCell(str(error), data.prompt_column) from error
    texts = [_text(response) for response in responses]
    scores = np.array([_reward(value) for value in rewards])
    return [as_example(prompt, text, tokenizer, row_kwargs(row, data)) for text in texts], scores


def _listed(row: Row, column: str) -> list[object]:
    value = row[column]
    if not isinstance(value, list) or not value:
        raise BadCell(f"must be a list that isn't empty, got {value!r:.60}", column)
    return value


def _text(response: object) -> str:
    """A response may be empty: its end token alone is what was sampled then."""
    return response if isinstance(response, str) else completion_text(response)


def _reward(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadCell(f"a reward must be a finite number or null, got {value!r:.60}", REWARDS)
    return float(value)


def _group(row: int, text: Any, samples: list[Sample], rewards_G: np.ndarray) -> OfflineGroup:
    prompt_length = int(samples[0].loss_mask.argmax())
    trajectories = tuple(
        Trajectory(
            token_ids=sample.token_ids,
            loss_mask=sample.loss_mask,
            sampler_logprobs=np.where(sample.loss_mask, np.nan, 0).astype(np.float32),
            versions=np.full(sample.num_tokens, NO_VERSION, np.int32),
            prompt_length=prompt_length,
            finish_reason=FINISH_STOP,
        )
        for sample in samples
    )
    prompt = Prompt(row, row, text, samples[0].token_ids[:prompt_length], {}, len(samples), 0)
    scored = ScoredGroup(
        uid=row, rewards=rewards_G, task_rewards=rewards_G, parts={},
        num_tokens=np.array([t.num_tokens for t in trajectories]),
        num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
        truncated=np.zeros(len(trajectories), bool), oldest_version=NO_VERSION,
    )
    return OfflineGroup(RolloutGroup(prompt, trajectories), scored)
