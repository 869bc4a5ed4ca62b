"""What will be optimised, in words and formulas, from the config alone.

Takes:  a Config.
Gives:  `explain`: lines of (heading, text): rewards, advantage, terms with their signs, denominators, policies, masks.
Knows:  the formula of each of our estimators, losses and aggregations, in one table each.
Never:  starts anything; says what `check` warns of (the command prints both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flux_ray.algo.algorithms import Algorithm, estimator_config, masks_truncated, needs_old_logprobs, resolve
from flux_ray.algo.kinds import PAIRS, REINFORCEMENT, kind_of, needs_reference, reference_is_base
from flux_ray.config import AlgoConfig, Config
from flux_ray.names import reward_name

STD = "(R − mean) / (std + 1e-6) over the group (std with ddof 1)"
CENTRED = "R − mean over the group"

#: estimator ► A, told whether it divides by the standard deviation
ADVANTAGES: dict[str, Callable[[bool], str]] = {
    "grpo": lambda divides: STD if divides else CENTRED,
    "grpo_vectorized": lambda divides: STD if divides else CENTRED,
    "dr_grpo": lambda divides: CENTRED,
    "rloo": lambda divides: "R − mean of the group's other samples",
    "reinforce": lambda divides: "the return to go, no baseline",
    "reinforce_pp": lambda divides: "the return to go, whitened over all loss tokens of the batch (ddof 0)",
    "reinforce_pp_baseline": lambda divides: f"{CENTRED}, whitened over all loss tokens of the batch (ddof 0)",
    "gae": lambda divides: "the sum of (γλ)^k·δ at the k-th loss token on, δ = r + γ·V' − V, V' that of the next loss "
                           "token (0 after the last)",
}

#: loss ► (the term, what its ratio is), by the numbers of the clip: {low}, {high}
POLICY_TERMS: dict[str, tuple[str, str]] = {
    "ppo": ("−min(r·A, clip(r, 1 − {low:g}, 1 + {high:g})·A)", "r = π/{old} per token"),
    "gspo": ("−min(s·A, clip(s, 1 − {low:g}, 1 + {high:g})·A)", "s = exp(mean_t log π/{old}), one per sequence"),
    "gspo_token": ("−min(s_t·A, clip(s_t, 1 − {low:g}, 1 + {high:g})·A)",
                   "s_t = sg[s]·π/sg[π] with s = exp(mean_t log π/{old})"),
    "rloo": ("−min(r·A, clip(r, 1 − {low:g}, 1 + {high:g})·A)", "r = exp(Σ_t log π/{old}), one per sequence"),
    "cispo": ("−sg(min(r, 1 + {high:g}))·A·log π", "r = π/{old} per token"),
    "reinforce": ("−A·log π", "none"),
}

#: aggregation ► the weight w of a loss token
WEIGHTS = {
    "token_mean": "1/N_tokens: the mean over all loss tokens of the update",
    "sequence_mean": "1/(N_sequences·L): the mean over sequences of the mean over their L loss tokens",
    "constant_length": "1/(N_sequences·L_max), L_max = rollout.max_tokens = {max_tokens}: sums over tokens, never by "
                       "their own length",
    "sequence": "1/(N_sequences·L): each sequence counts once, its value spread over its L loss tokens",
}


def explain(config: Config) -> list[tuple[str, str]]:
    """(heading, text) in the order of the computation. UserError for a name that isn't known."""
    if kind_of(config.algo) is not REINFORCEMENT:
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
        *([("filter", _filter(config))] if config.filter.reward else []),
        ("advantage A", _advantage(config, algorithm)),
        *([("critic", _critic(config))] if algorithm.needs_critic else []),
        ("minimised", "Σ over loss tokens of w·(" + " ".join(["policy term", *_extra_terms(algo)]) + ")"),
        ("policy term", _policy_term(algo, algorithm)),
        ("ratio", _ratio(algo, algorithm)),
        ("correction", _correction(algo)),
        ("KL", "; ".join(_kl(algo)) or "none: no reference is loaded"),
        ("weight w", WEIGHTS[algorithm.aggregation].format(max_tokens=config.rollout.max_tokens)),
        ("masked", "; ".join(_masked(config))),
        ("updates", f"{algo.epochs * algo.mini_batches} per batch (algo.epochs={algo.epochs} × "
                    f"algo.mini_batches={algo.mini_batches}) of {config.batch.prompts_per_step} prompts × "
                    f"{config.rollout.group_size} samples"),
        *_trained(config),
    ]


#: objective on pairs ► what each pair adds, by beta {b:g} and label smoothing {e:g}
PAIR_TERMS = {
    "dpo": "−log σ({b:g}·h)",
    "cdpo": "−(1 − {e:g})·log σ({b:g}·h) − {e:g}·log σ(−{b:g}·h)",
    "ipo": "(h − 1/(2·{b:g}))²",
    "reward_model": "−log σ(s_w − s_l − margin)",
}


def _without_rollouts(config: Config) -> Iterator[tuple[str, str]]:
    """What sft and the objectives on pairs mean."""
    algo = config.algo
    yield "algorithm", algo.name
    if kind_of(algo).data != PAIRS:
        yield "minimised", "Σ w·(−log π) over the loss tokens, w = 1/N_tokens"
        yield "masked", "all but the completion and its end token"
        return
    yield "minimised", f"1/N·Σ over pairs of {PAIR_TERMS[algo.name].format(b=algo.beta, e=algo.label_smoothing)}"
    if algo.name == "reward_model":
        yield "score s", "of the chosen (w) and the rejected (l) text, read at its last token"
        return
    of_one = "log π" if algo.reference_free else "(log π − log π_ref)"
    form = "mean" if algo.pair_logprobs == "mean" else "sum"
    yield "h", f"{of_one} of the chosen response less that of the rejected, each the {form} over its tokens"
    yield "reward r", f"{algo.beta:g}·{of_one}: what accuracy and margin are measured by"
    yield "masked", "the prompt"


def _trained(config: Config) -> Iterator[tuple[str, str]]:
    """Which weights move; which model the reference is, where one is asked for."""
    lora = config.train.lora
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    yield "trained", (f"LoRA: B and A of W + {lora.alpha / lora.rank:g}·B·A, rank {lora.rank}, on {targets}; W stays"
                      if lora.rank else "all weights")
    if reference_is_base(config):
        yield "π_ref", "the policy without its adapter, in the training ranks: no reference actor is started"
    elif needs_reference(config.algo):
        yield "π_ref", f"{config.reference.path or 'the policy as it was loaded'}, in reference actors"


def _reward(config: Config) -> str:
    reward = config.reward
    functions = reward.functions or ["numeric_or_exact"]
    weights = reward.weights or [1.0] * len(functions)
    names = [reward_name(reference) for reference in functions]
    form = "{:g}·{}" if reward.combine == "sum" else "{:g}·z({})"
    text = " + ".join(form.format(w, name) for w, name in zip(weights, names, strict=True))
    if reward.combine == "each":
        text += ", z: less its group mean, over its group std"
    if reward.overlong_penalty:
        cache = reward.overlong_tokens or config.rollout.max_tokens / 5
        text += (f"; less up to {reward.overlong_penalty:g} for length, rising over the last {cache:g} of "
                 f"{config.rollout.max_tokens} tokens")
    return text


def _filter(config: Config) -> str:
    return (f"groups with the same {config.filter.reward} reward for all samples are dropped and drawn again, "
            f"{config.filter.max_batches} batches at most for a step")


def _advantage(config: Config, algorithm: Algorithm) -> str:
    known = ADVANTAGES.get(algorithm.estimator)
    if known is None:
        return f"what the registered estimator {algorithm.estimator} gives"
    text = known(estimator_config(config).normalize_by_std)
    if not algorithm.needs_critic:
        return text
    algo = config.algo
    whitened = ", whitened over all loss tokens of the batch (ddof 0)" if algo.whiten_advantages else ""
    return f"{text}; γ = {algo.gamma:g}, λ = {algo.gae_lambda:g}{whitened}"


def _critic(config: Config) -> str:
    critic = config.critic
    start = critic.path or "the policy's start"
    alone = f"; the first {critic.warmup_steps} steps train it alone" if critic.warmup_steps else ""
    return (f"V, from {start}: mean over loss tokens of ½·max((V − R_t)², (clip(V, V_old ± {critic.clip_range:g}) − "
            f"R_t)²), R_t = A_t + V_old before whitening, as many updates as the policy's{alone}")


def _extra_terms(algo: AlgoConfig) -> Iterator[str]:
    if algo.beta:
        yield f"+ {algo.beta:g}·KL"
    if algo.entropy_coef:
        yield f"− {algo.entropy_coef:g}·H"


def _policy_term(algo: AlgoConfig, algorithm: Algorithm) -> str:
    if algorithm.policy_loss not in POLICY_TERMS:
        return f"what the registered loss {algorithm.policy_loss} gives"
    high = algo.clip_range if algo.clip_range_high is None else algo.clip_range_high
    text = POLICY_TERMS[algorithm.policy_loss][0].format(low=algo.clip_range, high=high)
    if algo.dual_clip:
        text += f"; where A < 0 at most {algo.dual_clip:g}·|A|"
    return text


def _ratio(algo: AlgoConfig, algorithm: Algorithm) -> str:
    old = "μ" if algo.old_logprobs == "sampler" else "π_old"
    _, ratio = POLICY_TERMS.get(algorithm.policy_loss, ("", "the registered loss's own, of π and {old}"))
    text = ratio.format(old=old)
    if old == "μ" or not algorithm.ratio_loss:
        return text
    if needs_old_logprobs(algo):
        return f"{text}; π_old is computed by the trainer before the first update"
    return (f"{text}; π_old is sg[π], for there is one update per batch: the ratio is 1 and carries the gradient, the "
            "clip never binds")


def _correction(algo: AlgoConfig) -> str:
    ratio = "π_old/μ" if algo.off_policy_level == "token" else "exp(Σ_t log π_old/μ)"
    if algo.off_policy == "tis":
        return f"policy term × sg(min({ratio}, {algo.tis_cap:g}))"
    if algo.off_policy == "icepop":
        return f"policy term × sg({ratio}) inside [{algo.icepop_low:g}, {algo.icepop_high:g}], × 0 outside"
    return "none of the trainer's policy against the sampler's"


def _kl(algo: AlgoConfig) -> Iterator[str]:
    formulas = {"k1": "k1 = log π/π_ref", "k2": "k2 = (log π/π_ref)²/2", "k3": "k3 = π_ref/π − 1 + log π/π_ref"}
    if algo.beta:
        yield f"in the loss, weight {algo.beta:g}: {formulas[algo.kl_estimator]} per token"
    if algo.kl_coef:
        adapted = f", adapted to {algo.kl_target:g} nats a sequence" if algo.kl_target else ", fixed"
        yield f"in the reward, weight {algo.kl_coef:g}{adapted}: R less k1 = log π_old/π_ref at each token"


def _masked(config: Config) -> Iterator[str]:
    yield "tokens that the policy didn't sample (prompt, tools)"
    yield "samples that no reward scored"
    if masks_truncated(config):
        yield "truncated responses (they stay in their group's statistics)"
