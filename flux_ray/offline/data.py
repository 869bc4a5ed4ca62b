"""Reads the data of a training without rollouts: completions, preference pairs, groups rolled out before.

Takes:  the Config, a tokenizer, the model's context.
Gives:  `read`: the sources to train and to evaluate on; `read_groups`: those of groups, and the config that they need.
Knows:  the objective says what the data must be; columns show that data are groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_ray.algo.check import check_groups
from flux_ray.config import Config, GroupsConfig, OnPairs, PolicyGradientConfig, SFTConfig, as_groups
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.data.sets import LoadedSet
from flux_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = SftSource | PairSource | GroupSource


@dataclass(frozen=True)
class OfflineData:
    """The sources to learn from, and to evaluate on (None: nothing)."""

    train: Source
    evaluation: SftSource | PairSource | None
    warnings: tuple[str, ...]


def read(config: Config, tokenizer: PreTrainedTokenizerBase, *, context_length: int) -> OfflineData:
    """The data of an objective on completions or pairs. UserError for data that it can't learn from."""
    if isinstance(config, SFTConfig):
        return _examples(config, tokenizer, context_length)
    assert isinstance(config, OnPairs), config.algo.name
    return _pairs(config, tokenizer, context_length)


def _evaluates(config: SFTConfig | OnPairs) -> bool:
    return bool(config.eval.data or config.eval.share)


def _examples(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, context_length: int) -> OfflineData:
    train = SftSource.from_config(config, tokenizer, context_length=context_length)
    evaluation = SftSource.for_eval(config, tokenizer, context_length=context_length) if _evaluates(config) else None
    return OfflineData(train, evaluation, (*train.warnings(), *(evaluation.warnings() if evaluation else [])))


def _pairs(config: OnPairs, tokenizer: PreTrainedTokenizerBase, context_length: int) -> OfflineData:
    train = PairSource.from_config(config, tokenizer, context_length=context_length)
    evaluation = PairSource.for_eval(config, tokenizer, context_length=context_length) if _evaluates(config) else None
    warnings = [*train.warnings(), *(evaluation.warnings() if evaluation else [])]
    if train.has_margins and not config.is_score:
        warnings.append(f"{train.source}: column {config.data.margin_column!r} is read by algo=reward_model alone")
    return OfflineData(train, evaluation, tuple(warnings))


def read_groups(
    sets: list[LoadedSet], config: PolicyGradientConfig, tokenizer: PreTrainedTokenizerBase, *, context_length: int,
) -> tuple[GroupsConfig, OfflineData]:
    """Groups with their rewards, and the config to learn from them. UserError for groups that can't be learned from."""
    if len(sets) > 1:
        raise UserError(f"data.train: groups with given rewards are of one set, but it names {len(sets)}")
    source = GroupSource(sets[0], tokenizer, context_length=context_length)
    groups, warnings = as_groups(config, sizes=source.sizes)
    check_groups(groups, sizes=source.sizes)
    return groups, OfflineData(source, None, (*warnings, *source.warnings()))
