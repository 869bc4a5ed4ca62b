"""What is wrong or odd about an objective that isn't reinforcement learning on rollouts.

Takes:  the whole Config; of groups that were rolled out before, their sizes.
Gives:  `check_kind` (sft, pairs) and `check_offline` (given groups): a UserError for the first mistake, else warnings.
Knows:  which options each objective reads (the table of kinds), and what only rollouts could give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from flux_ray.algo.algorithms import resolve
from flux_ray.algo.estimators import find_adv_estimator
from flux_ray.algo.kinds import KINDS, kind_of
from flux_ray.config import AlgoConfig, Config, preset
from flux_ray.errors import UserError

_DEFAULTS = AlgoConfig()

#: Options of algo that objectives on pairs alone read.
OF_PAIRS = ("reference_free", "pair_logprobs", "label_smoothing")


def check_kind(config: Config) -> list[str]:
    """Warnings about an objective of the table of kinds. Raises UserError, with key and value."""
    for problem in _problems(config):
        raise UserError(problem)
    return []


def ignored_by_rollouts(algo: AlgoConfig) -> Iterator[str]:
    """Settings of pairs beside an algorithm that learns from rollouts."""
    for key in OF_PAIRS:
        if getattr(algo, key) != getattr(_DEFAULTS, key):
            readers = ", ".join(name for name, kind in KINDS.items() if key in kind.reads)
            yield f"algo.{key}={getattr(algo, key)} is read by {readers} alone, not by {algo.name}: leave it out"


def _problems(config: Config) -> Iterator[str]:
    algo, kind = config.algo, kind_of(config.algo)
    given = preset(algo.name).get("algo", {})
    for field in dataclasses.fields(AlgoConfig):
        value = getattr(algo, field.name)
        if field.name not in ("name", *kind.reads) and value not in (
                getattr(_DEFAULTS, field.name), given.get(field.name)):
            yield f"algo.{field.name}={value} is not read by {algo.name}: leave it out"
    if "beta" in kind.reads and not algo.beta:
        yield f"algo.beta must be > 0 for {algo.name}, where it is the scale of the implicit reward; got {algo.beta}"
    if kind.has_reference and algo.reference_free and config.reference.path:
        yield f"reference.path={config.reference.path} beside algo.reference_free=true: nothing would ask it"
    if config.reward.functions:
        yield (f"reward.functions={config.reward.functions} score rollouts: algo={algo.name} learns from "
               f"{kind.data} and has none")
    if config.eval.stop_at is not None:
        yield f"eval.stop_at={config.eval.stop_at} looks at rewards: algo={algo.name} has none"
    for setting in _of_rollouts(config):
        yield f"{setting}: algo={algo.name} learns from {kind.data}, nothing is rolled out"


def _of_rollouts(config: Config) -> Iterator[str]:
    """Settings of how rollouts are drawn and trained on, where they were changed."""
    if config.driver.max_staleness:
        yield f"driver.max_staleness={config.driver.max_staleness}"
    if config.driver.streaming == "always":
        yield "driver.streaming=always"
    if config.filter.oversample:
        yield f"filter.oversample={config.filter.oversample:g}"
    if config.rollout.split_groups > 1:
        yield f"rollout.split_groups={config.rollout.split_groups}"


def check_offline(config: Config, *, sizes: Collection[int]) -> list[str]:
    """Warnings about training on given groups of these sizes. Raises UserError, with key and value."""
    for problem in _offline_problems(config, sizes):
        raise UserError(f"groups with given rewards: {problem}")
    if config.reward.overlong_penalty:
        return [f"reward.overlong_penalty={config.reward.overlong_penalty}: not added to rewards that are given"]
    return []


def _offline_problems(config: Config, sizes: Collection[int]) -> Iterator[str]:
    algo, algorithm = config.algo, resolve(config.algo)
    estimator = find_adv_estimator(algorithm.estimator)
    if algorithm.needs_groups and min(sizes) < 2:
        yield f"{algorithm.name} compares the responses of a prompt: a group of {min(sizes)} has nothing to compare"
    if len(sizes) > 1 and (algorithm.estimator == "grpo_vectorized" or not estimator.ours):
        yield (f"the estimator {algorithm.estimator} works on groups of one size, the data have "
               f"{', '.join(map(str, sorted(sizes)))}")
    if algo.old_logprobs == "sampler":
        yield "algo.old_logprobs=sampler: nobody recorded the sampler's log-probs"
    if algo.off_policy != "none":
        yield f"algo.off_policy={algo.off_policy}: nobody recorded the sampler's log-probs"
    if config.reward.functions:
        yield f"reward.functions={config.reward.functions} beside rewards that are given: leave one of them out"
    if config.reward.combine != "sum":
        yield f"reward.combine={config.reward.combine}: there is one reward"
    for setting in _of_rollouts(config):
        yield f"{setting}: nothing is rolled out"
    if config.filter.reward not in (None, "task"):
        yield f"filter.reward={config.filter.reward}: there is one reward, task"
    if config.eval.data or config.eval.share:
        given = f"eval.data={config.eval.data}" if config.eval.data else f"eval.share={config.eval.share:g}"
        yield (f"{given} needs engines, which this training doesn't start: evaluate the model "
               "that it gives (FluxTrainer.evaluate)")
