"""The data of a training without rollouts: completions, preference pairs, groups that were rolled out before.

Takes:  the Config, a tokenizer, the model's context.
Gives:  `read`: the sources to train and to evaluate on, and the Config with what the data settle.
Knows:  that the objective says what the data must be, and that groups show by their columns.
Never:  starts anything; rolls out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flux_ray import algo
from flux_ray.algo.check_kinds import check_offline
from flux_ray.config import Config
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.data.sets import LoadedSet
from flux_ray.errors import UserError

Source = SftSource | PairSource | GroupSource
SOURCES: dict[str, type[SftSource] | type[PairSource]] = {algo.EXAMPLES: SftSource, algo.PAIRS: PairSource}


@dataclass(frozen=True)
class OfflineData:
    """What there is to learn from, and to evaluate on (None: nothing)."""

    train: Source
    evaluation: SftSource | PairSource | None
    warnings: tuple[str, ...]


def read(config: Config, tokenizer: Any, *, context_length: int) -> OfflineData:
    """The data of an objective on completions or pairs. UserError for what they can't be."""
    source = SOURCES[algo.kind_of(config.algo).data]
    train = source.from_config(config, tokenizer, context_length=context_length)
    evaluates = config.eval.data or config.eval.share
    evaluation = source.for_eval(config, tokenizer, context_length=context_length) if evaluates else None
    warnings = [*train.warnings(), *(evaluation.warnings() if evaluation else [])]
    if isinstance(train, PairSource) and train.has_margins and algo.kind_of(config.algo).model != algo.SCORE:
        warnings.append(f"{train.source}: column {config.data.margin_column!r} is read by algo=reward_model alone")
    return OfflineData(train, evaluation, tuple(warnings))


def read_groups(
    sets: list[LoadedSet], config: Config, tokenizer: Any, *, context_length: int,
) -> tuple[Config, OfflineData]:
    """Groups with their rewards, and the Config with what they settle. UserError for what can't be learned from."""
    if len(sets) > 1:
        raise UserError(f"data.train: groups with given rewards are of one set, but it names {len(sets)}")
    source = GroupSource(sets[0], tokenizer, context_length=context_length)
    warnings = [*check_offline(config, sizes=source.sizes), *source.warnings()]
    rollout = dataclasses.replace(config.rollout, group_size=max(source.sizes))
    reward = dataclasses.replace(config.reward, overlong_penalty=0.0)
    return dataclasses.replace(config, rollout=rollout, reward=reward), OfflineData(source, None, tuple(warnings))
