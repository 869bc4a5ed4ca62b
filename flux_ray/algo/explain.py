"""Explains in words and formulas what a config optimises.

Takes:  a Config.
Gives:  `explain`: lines of (heading, text): rewards, advantage, terms with their signs, denominators, policies, masks.
Knows:  how terms make an objective; each term's formula stands beside its code.
Never:  starts anything; repeats a warning of `check` (the command prints both).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator

from flux_ray.algo import preferences, supervised, values
from flux_ray.algo.algorithms import (
    Algorithm,
    estimator_config,
    masks_truncated,
    needs_old_logprobs,
    needs_reference,
    reference_is_base,
    resolve,
)
from flux_ray.algo.estimators import find_adv_estimator
from flux_ray.algo.kl import KL_ESTIMATORS
from flux_ray.algo.losses import find_policy_loss
from flux_ray.algo.objective import CORRECTIONS
from flux_ray.batch import AGGREGATIONS
from flux_ray.config import (
    AlgoConfig,
    Config,
    FilterConfig,
    IPOAlgoConfig,
    LossConfig,
    PairsConfig,
    PolicyGradientConfig,
    PPOConfig,
    ReferencedConfig,
    SFTConfig,
    changed,
)
from flux_ray.names import reward_name


def explain(config: Config) -> list[tuple[str, str]]:
    """(heading, text) in the order of the computation. UserError for a name that isn't known."""
    if not isinstance(config, PolicyGradientConfig):
        return [*_without_rollouts(config), *_trained(config)]
    algorithm = resolve(config.algo)
    algo = config.algo
    source = f" (arXiv {algorithm.source})" if algorithm.source[:1].isdigit() else ""
    return [
        ("algorithm", f"{algorithm.name}{source}: estimator {algorithm.estimator}, loss {algorithm.policy_loss}, "
                      f"aggregation {algorithm.aggregation}"),
        ("policies", "π trained; π_old the trainer's before the batch's first update; μ the sampler's; π_ref the "
                     "frozen reference; sg: no gradient"),
        ("reward R", _reward(config)),
        *([("filter", _filter(config.filter))] if config.filter.reward else []),
        ("advantage A", _advantage(config, algorithm)),
        *([("critic", _critic(config))] if isinstance(config, PPOConfig) else []),
        ("minimised", "Σ over loss tokens of w·(" + " ".join(["policy term", *_extra_terms(algo)]) + ")"),
        ("policy term", _policy_term(config, algorithm)),
        ("ratio", _ratio(algo, algorithm)),
        ("correction", _correction(config)),
        ("KL", "; ".join(_kl(algo)) or "none: no reference is loaded"),
        ("weight w", str(AGGREGATIONS[algorithm.aggregation].formula.at(_values(config)))),
        ("masked", "; ".join(_masked(config))),
        ("updates", f"{algo.epochs * algo.mini_batches} per batch (algo.epochs={algo.epochs} × "
                    f"algo.mini_batches={algo.mini_batches}) of {config.batch.prompts_per_step} prompts × "
                    f"{config.rollout.group_size} samples"),
        *_trained(config),
    ]


def _without_rollouts(config: Config) -> Iterator[tuple[str, str]]:
    """The objective of sft, or on pairs."""
    yield "algorithm", config.algo.name
    if isinstance(config, SFTConfig):
        yield "minimised", f"Σ over loss tokens of w·({supervised.FORMULA.text})"
        yield "weight w", AGGREGATIONS[supervised.AGGREGATION].formula.text
        yield "masked", "all but the completion and its end token"
        return
    formula = preferences.FORMULAS[config.algo.name]
    yield "minimised", f"the mean over pairs of {formula.at(_values(config)).text}"
    if not isinstance(config, PairsConfig):
        yield "score s", formula.where
        return
    algo = config.algo
    of_one = "log π" if algo.reference_free else "(log π − log π_ref)"
    form = "mean" if isinstance(algo, IPOAlgoConfig) and algo.pair_logprobs == "mean" else "sum"
    yield "h", f"{of_one} of the chosen response less that of the rejected, each the {form} over its tokens"
    yield "reward r", f"{algo.beta:g}·{of_one}: what accuracy and margin are measured by"
    yield "masked", "the prompt"


def _trained(config: Config) -> Iterator[tuple[str, str]]:
    """Which weights are trained; which model the reference is, where one is needed."""
    lora = config.train.lora
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    yield "trained", (f"LoRA: B and A of W + {lora.alpha / lora.rank:g}·B·A, rank {lora.rank}, on {targets}; W stays"
                      if lora.rank else "all weights")
    if reference_is_base(config):
        yield "π_ref", "the policy without its adapter, in the training ranks: no reference actor is started"
    elif isinstance(config, ReferencedConfig) and needs_reference(config.algo):
        yield "π_ref", f"{config.reference.path or 'the policy as it was loaded'}, in reference actors"


def _reward(config: PolicyGradientConfig) -> str:
    reward = config.reward
    names = [reward_name(reference) for reference in reward.scored_by]
    weights = reward.weights or [1.0] * len(names)
    form = "{:g}·{}" if reward.combine == "sum" else "{:g}·z({})"
    text = " + ".join(form.format(w, name) for w, name in zip(weights, names, strict=True))
    if reward.combine == "each":
        text += ", z: less its group mean, over its group std"
    if reward.overlong_penalty:
        longest = config.rollout.max_tokens
        text += (f"; less up to {reward.overlong_penalty:g} for length, rising over the last "
                 f"{reward.overlong_span(longest):g} of {longest} tokens")
    return text


def _filter(config: FilterConfig) -> str:
    return (f"groups with the same {config.reward} reward for all samples are dropped and drawn again, "
            f"{config.max_batches} batches at most for a step")


def _advantage(config: PolicyGradientConfig, algorithm: Algorithm) -> str:
    estimator = find_adv_estimator(algorithm.estimator)
    told = changed(config, {"algo": estimator_config(config)})
    return (str(estimator.formula.at(_values(told, estimator.function)))
            or f"what the registered estimator {algorithm.estimator} gives")


def _critic(config: PPOConfig) -> str:
    critic = config.critic
    start = critic.path or "the policy's start"
    alone = f"; the first {critic.warmup_steps} steps train it alone" if critic.warmup_steps else ""
    return (f"V, from {start}: mean over loss tokens of {values.FORMULA.at(_values(config))}; "
            f"as many updates as the policy's{alone}")


def _extra_terms(algo: AlgoConfig) -> Iterator[str]:
    if algo.beta:
        yield f"+ {algo.beta:g}·KL"
    if algo.entropy_coef:
        yield f"− {algo.entropy_coef:g}·H"


def _policy_term(config: PolicyGradientConfig, algorithm: Algorithm) -> str:
    loss = find_policy_loss(algorithm.policy_loss)
    return (loss.formula.at(_values(config, loss.function)).text
            or f"what the registered loss {algorithm.policy_loss} gives")


def _ratio(algo: AlgoConfig, algorithm: Algorithm) -> str:
    loss = find_policy_loss(algorithm.policy_loss)
    old = "μ" if algo.old_logprobs == "sampler" else "π_old"
    if not loss.ratio:
        return "none"
    text = (loss.formula.where or "the registered loss's own, of π and π_old").replace("π_old", old)
    if old == "μ":
        return text
    if needs_old_logprobs(algo):
        return f"{text}; π_old is computed by the trainer before the first update"
    return (f"{text}; π_old is sg[π], for there is one update per batch: the ratio is 1 and carries the gradient, the "
            "clip never binds")


def _correction(config: PolicyGradientConfig) -> str:
    correction = CORRECTIONS.get(config.algo.off_policy)
    if correction is None:
        return "none of the trainer's policy against the sampler's"
    form = "π_old/μ per token" if config.algo.off_policy_level == "token" else "exp(Σ_t log π_old/μ), one per sequence"
    return f"policy term × {correction.formula.at(_values(config)).text}, ρ = {form}"


def _kl(algo: AlgoConfig) -> Iterator[str]:
    name = algo.kl_estimator
    if algo.beta:
        yield f"in the loss, weight {algo.beta:g}: {name} = {KL_ESTIMATORS[name].formula.text} per token"
    if algo.kl_coef:
        adapted = f", adapted to {algo.kl_target:g} nats a sequence" if algo.kl_target else ", fixed"
        yield f"in the reward, weight {algo.kl_coef:g}{adapted}: r_t less the weight times k1 = log π_old/π_ref"


def _masked(config: PolicyGradientConfig) -> Iterator[str]:
    yield "tokens that the policy didn't sample (prompt, tools)"
    yield "samples that no reward scored"
    if masks_truncated(config):
        yield "truncated responses (they stay in their group's statistics)"


def _values(config: Config, function: Callable[..., object] | None = None) -> dict[str, object]:
    """Option ► value, as formulas name them: of algo, of other groups, and what `function` takes from algo.options."""
    found = {f"{name}.{option}": value for name, section in vars(config).items() if dataclasses.is_dataclass(section)
             for option, value in vars(section).items()}
    found |= vars(config.algo)
    if found.get("clip_range_high") is None:
        found["clip_range_high"] = found.get("clip_range")
    arguments = inspect.signature(function).parameters.values() if function else ()
    own = config.algo.options if isinstance(config.algo, LossConfig) else {}
    return found | {a.name: a.default for a in arguments if a.default is not a.empty} | own
