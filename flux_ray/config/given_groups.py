"""Groups with given rewards: the config of policy gradient, less all that only rollouts could give.

Gives:  `as_groups`: a GroupsConfig from a PolicyGradientConfig, with what was left out of an algorithm's preset; a
        UserError for an option that was set and that nothing would read.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flux_ray import names
from flux_ray.config.knobs import default_of, options_of, value_of
from flux_ray.config.objectives import GroupsConfig, PolicyGradientConfig
from flux_ray.config.read import changed, preset
from flux_ray.errors import UserError

NOTHING_ROLLED_OUT = "nothing is rolled out"
#: Why an option isn't there, by the option or its section; else nothing is rolled out.
REASONS = {
    "algo.old_logprobs": "nobody recorded the sampler's log-probs",
    "algo.off_policy": "nobody recorded the sampler's log-probs",
    "algo.mask_truncated": "responses that are given are taken as whole",
    "reward.functions": "there are rewards that are given: leave one of them out",
    "reward": "there is one reward",
    "eval": "it needs engines, which this training doesn't start: evaluate the model that it gives "
            "(FluxTrainer.evaluate)",
}


def as_groups(config: PolicyGradientConfig, *, sizes: Collection[int]) -> tuple[GroupsConfig, list[str]]:
    """The config of a training on groups of these sizes; a warning for what an algorithm's preset had set in vain."""
    own, values, warnings = dict(options_of(GroupsConfig)), {}, []
    chosen = names.flatten(preset(config.algo.name), options=[key for key, _ in options_of(type(config))])
    for key, f in options_of(type(config)):
        value = value_of(config, key)
        if key in own:
            values[key] = value
        elif value != default_of(f) and value != chosen.get(key):
            raise UserError(f"groups with given rewards: {key}={value}: {_reason(key)}")
    penalty = config.reward.overlong_penalty
    if penalty:
        warnings.append(f"reward.overlong_penalty={penalty}: not added to rewards that are given")
    if config.filter.reward not in (None, "task"):
        raise UserError(f"groups with given rewards: filter.reward={config.filter.reward}: there is one reward, task")
    _refuse_other_size(config.rollout.group_size, sizes)
    return changed(GroupsConfig(), {**values, "rollout.group_size": max(sizes)}), warnings


def _refuse_other_size(group_size: int, sizes: Collection[int]) -> None:
    default: Any = default_of(dict(options_of(GroupsConfig))["rollout.group_size"])
    if group_size not in (default, *sizes):
        raise UserError(f"groups with given rewards: rollout.group_size={group_size}: the data have groups of "
                        f"{', '.join(map(str, sorted(sizes)))}: leave it out")


def _reason(key: str) -> str:
    return REASONS.get(key) or REASONS.get(key.partition(".")[0]) or NOTHING_ROLLED_OUT
