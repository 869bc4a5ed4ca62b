"""Checks a configuration, as far as the algorithm is concerned.

Takes:  the whole Config.
Gives:  `check`: a UserError for the first thing that can't be trained, else a list of warnings; `check_groups`, for
        groups that were rolled out before.
Knows:  what each estimator and loss needs and reads (their registries say so).
Never:  checks one value alone (flux_ray.config does), a file or a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from flux_ray.algo.algorithms import ALGORITHMS, Algorithm, resolve
from flux_ray.algo.estimators import find_adv_estimator
from flux_ray.algo.kl import MAX_ERROR
from flux_ray.algo.losses import PolicyLoss, find_policy_loss
from flux_ray.config import (
    DEFAULT_ALGORITHM,
    AlgoConfig,
    Config,
    GroupsConfig,
    PolicyGradientConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    preset,
)
from flux_ray.errors import UserError
from flux_ray.names import reward_name
from flux_ray.records import OVERLONG

#: Options that make the sampler's distribution another than the policy's ► the value at which they don't.
TRUNCATING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}

#: Algorithms whose papers have no KL to a reference.
WITHOUT_KL = ("dr_grpo", "dapo", "gspo", "gspo_token", "cispo")

#: A larger clip range can't bind on a ratio that is a mean over a sequence's tokens (2507.18071 has 3e-4 and 4e-4).
MAX_USUAL_SEQUENCE_CLIP = 0.01


def check(config: Config) -> list[str]:
    """Warnings, one line each, about what is legal but odd. UserError, with key and value, for what isn't legal."""
    if not isinstance(config, PolicyGradientConfig):
        return []
    algorithm = resolve(config.algo)
    for problem in (*_values_problems(config, algorithm), *_problems(config, algorithm),
                    *_reward_problems(config.reward, config.rollout), *_ignored(config.algo, algorithm)):
        raise UserError(problem)
    return list(_oddities(config, algorithm))


def _problems(config: PolicyGradientConfig, algorithm: Algorithm) -> Iterator[str]:
    algo, rollout = config.algo, config.rollout
    if algorithm.needs_groups and rollout.group_size < 2:
        yield f"rollout.group_size must be >= 2 for {algorithm.name}, got {rollout.group_size}"
    if algo.beta > 0 and algo.kl_estimator == "k1":
        yield f"algo.kl_estimator=k1 has no useful gradient in the loss (algo.beta={algo.beta}): choose k2 or k3"
    if algorithm.ratio_loss and not rollout.allow_truncated_sampling:
        for key, neutral in TRUNCATING.items():
            value = getattr(rollout, key)
            if value != neutral:
                yield (f"rollout.{key}={value} samples from another distribution than the policy's, which the ratio of "
                       f"{algorithm.name} is over: leave it {neutral} or set rollout.allow_truncated_sampling=true")
    if config.driver.streaming == "always" and (algorithm.needs_whole_batch or algorithm.needs_critic):
        yield (f"driver.streaming=always: {algorithm.name} needs the whole batch before its first gradient "
               "(whitening, a critic, or several updates per batch)")
    num_sequences = config.batch.prompts_per_step * rollout.group_size
    if algo.kl_target is not None and MAX_ERROR * num_sequences >= algo.kl_horizon:
        yield (f"algo.kl_horizon={algo.kl_horizon:g} must be > {MAX_ERROR * num_sequences:g} for {num_sequences} "
               "sequences a step: kl_coef could fall to 0 or below")
    if algo.off_policy == "none":
        return
    if algo.old_logprobs == "sampler":
        yield (f"algo.off_policy={algo.off_policy} beside algo.old_logprobs=sampler would correct twice: "
               "the ratio is over the sampler's log-probs already")
    if algorithm.sequence_level and algo.off_policy_level != "sequence":
        yield (f"algo.off_policy_level must be sequence for {algorithm.name}, whose ratio is one per sequence; "
               f"got {algo.off_policy_level}")


def _reward_problems(reward: RewardConfig, rollout: RolloutConfig) -> Iterator[str]:
    if reward.combine == "each" and rollout.group_size < 2:
        yield f"reward.combine=each normalises over a group: rollout.group_size must be >= 2, got {rollout.group_size}"
    cache = reward.overlong_tokens
    if cache is not None and not reward.overlong_penalty:
        yield f"reward.overlong_tokens={cache} is read with reward.overlong_penalty > 0 alone"
    if cache is not None and cache > rollout.max_tokens:
        yield f"reward.overlong_tokens={cache} must be <= rollout.max_tokens={rollout.max_tokens}"
    if reward.overlong_penalty and OVERLONG in map(reward_name, reward.functions):
        yield f"reward.functions has an {OVERLONG!r}, as reward.overlong_penalty is called: give it another name"


def _ignored(algo: AlgoConfig, algorithm: Algorithm) -> Iterator[str]:
    """Options that were changed and that nothing would read."""
    loss, estimator = find_policy_loss(algorithm.policy_loss), find_adv_estimator(algorithm.estimator)
    if loss.ours:
        for key in PolicyLoss.reads:
            if key not in loss.reads and _changed(algo, key):
                yield f"algo.{key}={getattr(algo, key)} is not read by the loss {algorithm.policy_loss}: leave it out"
    if estimator.ours and "normalize_by_std" not in estimator.reads and _chosen(algo, "normalize_by_std"):
        yield (f"algo.normalize_by_std={algo.normalize_by_std} is not read by the estimator {algorithm.estimator}: "
               "leave it out")
    unread = {"kl_estimator": not algo.beta and "algo.beta", "off_policy_level": algo.off_policy == "none"
              and "algo.off_policy", "old_logprobs": loss.ours and not loss.ratio and "a loss with a ratio"}
    for key, missing in unread.items():
        if missing and _chosen(algo, key):
            yield f"algo.{key}={getattr(algo, key)} is not read without {missing}: leave it out"
    if algo.options and loss.ours and estimator.ours:
        yield f"algo.options={algo.options} is for registered functions: {algorithm.name} takes none"
    for key in ("kl_target", "kl_horizon"):
        needed = "kl_coef" if key == "kl_target" else "kl_target"
        if _changed(algo, key) and not getattr(algo, needed):
            yield f"algo.{key}={getattr(algo, key)} adapts the KL in the reward: it needs algo.{needed}"
    readers = {"tis_cap": ("tis",), "icepop_low": ("icepop",), "icepop_high": ("icepop",)}
    for key, corrections in readers.items():
        if _changed(algo, key) and algo.off_policy not in corrections:
            yield (f"algo.{key}={getattr(algo, key)} is read with algo.off_policy={corrections[0]} alone, "
                   f"which is {algo.off_policy}")


def _values_problems(config: PolicyGradientConfig, algorithm: Algorithm) -> Iterator[str]:
    """An estimator that needs a critic where none is trained, or a critic that the estimator doesn't read."""
    estimator = algorithm.estimator
    if algorithm.needs_critic and not isinstance(config, PPOConfig):
        beside = "" if estimator == ALGORITHMS["ppo"].estimator else f" algo.estimator={estimator}"
        yield (f"the estimator {estimator} of algo.name={algorithm.name} needs a critic's values: choose "
               f"algo=ppo{beside}")
    if isinstance(config, PPOConfig) and not algorithm.needs_critic:
        yield (f"algo.estimator={estimator} doesn't read the values of the critic that algo=ppo trains: choose another "
               f"algorithm, e.g. algo={DEFAULT_ALGORITHM}")


def _oddities(config: PolicyGradientConfig, algorithm: Algorithm) -> Iterator[str]:
    algo, name = config.algo, algorithm.name
    if algorithm.estimator == "dr_grpo" and algo.normalize_by_std:
        yield f"algo.normalize_by_std=True does nothing: {name} never divides by the standard deviation"
    if algorithm.policy_loss in ("gspo", "gspo_token") and algo.clip_range > MAX_USUAL_SEQUENCE_CLIP:
        yield (f"algo.clip_range={algo.clip_range} with {name}: its ratio is a mean over tokens and hardly leaves 1, "
               "3e-4 is usual")
    if name in WITHOUT_KL and algo.beta > 0:
        yield f"algo.beta={algo.beta} with {name}: the paper has no KL in the loss"
    if algo.beta > 0 and algo.kl_coef > 0:
        yield f"algo.beta={algo.beta} and algo.kl_coef={algo.kl_coef}: the KL is paid twice, in loss and reward"
    if algorithm.sequence_level and algorithm.aggregation not in ("sequence", "sequence_mean"):
        yield f"algo.aggregation={algorithm.aggregation} with {name}: a longer sequence weighs more in the loss"
    clipped = any(_chosen(algo, key) for key in ("clip_range", "clip_range_high", "dual_clip"))
    one_update = not algorithm.several_updates and algo.old_logprobs == "trainer"
    if algorithm.ratio_loss and one_update and clipped:
        yield (f"the clip of {name} can't bind: there is one update per batch (algo.epochs × algo.mini_batches = 1), "
               "so every ratio is 1")
    if config.train.lora.dropout:
        yield (f"train.lora.dropout={config.train.lora.dropout} with {name}: the policy that learns isn't the one that "
               "was sampled, and weights/logprob_gap_* and the ratio say so")
    if config.driver.max_staleness > 0 and config.filter.oversample:
        yield (f"filter.oversample={config.filter.oversample:g} with driver.max_staleness="
               f"{config.driver.max_staleness}: no spares are drawn, groups of the next batches stand in for "
               "dropped ones")
    if config.driver.max_staleness > 0 and algo.old_logprobs == "trainer" and algo.off_policy == "none":
        yield (f"driver.max_staleness={config.driver.max_staleness} with algo.old_logprobs=trainer and "
               "algo.off_policy=none: nothing corrects for samples of older versions")


def _changed(algo: AlgoConfig, key: str) -> bool:
    return getattr(algo, key) != getattr(type(algo)(), key)


def _chosen(algo: AlgoConfig, key: str) -> bool:
    """Changed, and not by the algorithm's own preset."""
    return _changed(algo, key) and getattr(algo, key) != preset(algo.name).get("algo", {}).get(key)


def check_groups(config: GroupsConfig, *, sizes: Collection[int]) -> None:
    """UserError for an algorithm that can't learn from given groups of these sizes."""
    algorithm = resolve(config.algo)
    estimator, what = find_adv_estimator(algorithm.estimator), "groups with given rewards"
    if algorithm.needs_groups and min(sizes) < 2:
        raise UserError(f"{what}: {algorithm.name} compares the responses of a prompt: a group of {min(sizes)} has "
                        "nothing to compare")
    if len(sizes) > 1 and (algorithm.estimator == "grpo_vectorized" or not estimator.ours):
        raise UserError(f"{what}: the estimator {algorithm.estimator} works on groups of one size, the data have "
                        f"{', '.join(map(str, sorted(sizes)))}")
