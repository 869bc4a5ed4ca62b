"""The objectives: what can be trained, and the config of each, which has the options that it reads and no others.

Gives:  a section `algo` and a whole Config for each objective; `objective_of`: the Config class that algo.name means.
Knows:  what isn't in the table is policy gradient: an algorithm of ours (flux_ray.algo), or what a plugin registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from flux_ray import names
from flux_ray.config import sections
from flux_ray.config.knobs import group, knob, retuned

DEFAULT_ALGORITHM = "grpo"
PROMPTS, EXAMPLES, PAIRS, GROUPS = "prompts", "examples", "pairs", "groups with given rewards"  # what is learned from


@dataclass(frozen=True)
class ObjectiveConfig:
    """The section `algo`, of any objective."""

    name: str = knob(DEFAULT_ALGORITHM, "the algorithm: a choice of the group algo, or the name of what a plugin "
                     "registers")


@dataclass(frozen=True)
class LossConfig(ObjectiveConfig):
    """A policy gradient's advantages and loss, wherever its groups are from."""

    estimator: str | None = knob(None, "advantage estimator; none: the algorithm's own")
    policy_loss: str | None = knob(None, "policy loss; none: the algorithm's own")
    clip_range: float = knob(0.2, "epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon]", above=0)
    clip_range_high: float | None = knob(None, "upper epsilon; none: clip_range", above=0)
    dual_clip: float | None = knob(None, "c > 1: where A < 0 a term is at least c x A, whatever the ratio; none: off",
                                   above=1)
    beta: float = knob(0.01, "weight of the KL to the reference in the loss; 0: no KL there", least=0)
    kl_coef: float = knob(0.0, "weight of the KL to the reference in the reward; 0: no KL there", least=0)
    kl_target: float | None = knob(None, "adapt kl_coef until a sequence's KL in the reward is this, in nats; none: "
                                   "fixed", above=0)
    kl_horizon: float = knob(10_000.0, "sequences over which an adapted kl_coef moves by its error", above=0)
    kl_estimator: str = knob("k3", "estimator of the KL in the loss (k1 has no useful gradient there: refused)",
                             choices=("k1", "k2", "k3"))
    entropy_coef: float = knob(0.01, "weight of the entropy bonus", least=0)
    normalize_by_std: bool = knob(True, "divide a group's advantages by its standard deviation")
    aggregation: str | None = knob(None, "how tokens weigh in the loss; none: the algorithm's own",
                                   choices=("token_mean", "sequence_mean", "constant_length", "sequence"))
    epochs: int = knob(1, "passes over a batch", least=1)
    mini_batches: int = knob(1, "optimizer updates per pass", least=1)
    options: dict[str, Any] = knob({}, "further arguments for a registered estimator or loss")


@dataclass(frozen=True)
class AlgoConfig(LossConfig):
    """Policy gradient on what the run samples."""

    old_logprobs: str = knob("trainer", "the denominator of the ratio: the trainer's old policy, or the sampler's",
                             choices=("trainer", "sampler"))
    off_policy: str = knob("none", "correction of trainer against sampler: none, tis (truncated) or icepop (masked)",
                           choices=("none", "tis", "icepop"))
    off_policy_level: str = knob("token", "form of that correction", choices=("token", "sequence"))
    tis_cap: float = knob(2.0, "C of tis: the weight is min(ratio, C)", above=0)
    icepop_low: float = knob(0.5, "icepop: below it the weight is 0", least=0)
    icepop_high: float = knob(5.0, "icepop: above it the weight is 0", above=0)
    router_replay: bool = knob(False, "mixtures of experts: the trainer takes the experts that the engine chose for "
                               "each token, weighed by its own routers (R3); engines return them for that")
    mask_truncated: bool = knob(False, "truncated responses leave the loss (they stay in their group's statistics), "
                                "except under reward.overlong_penalty, which they would not learn from")


@dataclass(frozen=True)
class PPOAlgoConfig(AlgoConfig):
    """Policy gradient with a critic's values; the KL is in the reward."""

    name: str = retuned(AlgoConfig, "name", "ppo")
    beta: float = retuned(AlgoConfig, "beta", 0.0)
    kl_coef: float = retuned(AlgoConfig, "kl_coef", 0.05)
    entropy_coef: float = retuned(AlgoConfig, "entropy_coef", 0.0)
    gamma: float = knob(1.0, "discount of later rewards per token (gae)", least=0, most=1)
    gae_lambda: float = knob(0.95, "weight of later errors of the critic's values (gae); 1: returns less values",
                             least=0, most=1)
    whiten_advantages: bool = knob(True, "advantages over the batch's loss tokens get mean 0 and deviation 1 (gae)")


@dataclass(frozen=True)
class GroupsAlgoConfig(LossConfig):
    """Policy gradient on groups that were sampled elsewhere: nobody recorded the sampler's log-probs."""

    old_logprobs: ClassVar[str] = "trainer"
    off_policy: ClassVar[str] = "none"


@dataclass(frozen=True)
class PairsAlgoConfig(ObjectiveConfig):
    """DPO, and what its kin share."""

    name: str = retuned(ObjectiveConfig, "name", "dpo")
    beta: float = knob(0.1, "scale of the implicit reward beta x log π/π_ref; > 0", least=0)
    reference_free: bool = knob(False, "pairs: no reference model, as if one held all responses equally likely")


@dataclass(frozen=True)
class IPOAlgoConfig(PairsAlgoConfig):
    name: str = retuned(PairsAlgoConfig, "name", "ipo")
    pair_logprobs: str = knob("mean", "a response's log-prob is the mean over its tokens, or their sum",
                              choices=("sum", "mean"))


@dataclass(frozen=True)
class CDPOAlgoConfig(PairsAlgoConfig):
    name: str = retuned(PairsAlgoConfig, "name", "cdpo")
    label_smoothing: float = knob(0.1, "probability that a pair's label is wrong", least=0, most=0.5)


@dataclass(frozen=True)
class RewardModelAlgoConfig(ObjectiveConfig):
    name: str = retuned(ObjectiveConfig, "name", "reward_model")


@dataclass(frozen=True)
class SFTAlgoConfig(ObjectiveConfig):
    name: str = retuned(ObjectiveConfig, "name", "sft")


@dataclass(frozen=True)
class Config:
    """What the config of every objective has."""

    learns_from: ClassVar[str]
    is_score: ClassVar[bool] = False  # the model that is trained gives one score a token, not log-probs

    seed: int = knob(0, "one seed for everything", least=0)
    run_dir: str | None = knob(None, "folder of the run; none: runs/DATE_TIME under the folder it was started in")
    resume: str | None = knob(None, "a run folder, or one of its checkpoints, to go on from; auto: what lies in "
                                    "run_dir")
    plugins: list[str] = knob([], "Python files imported in every process: they register algorithms, rewards, rollouts")
    data: sections.DataConfig = group(sections.DataConfig)
    model: sections.ModelConfig = group(sections.ModelConfig)
    algo: ObjectiveConfig = group(ObjectiveConfig)
    rollout: sections.ContextConfig = group(sections.ContextConfig)
    batch: sections.BatchConfig = group(sections.BatchConfig)
    train: sections.TrainConfig = group(sections.TrainConfig)
    cluster: sections.ClusterConfig = group(sections.ClusterConfig)
    driver: sections.StepsConfig = group(sections.StepsConfig)
    checkpoint: sections.CheckpointConfig = group(sections.CheckpointConfig)
    observability: sections.ObservabilityConfig = group(sections.ObservabilityConfig)


@dataclass(frozen=True)
class PolicyGradientConfig(Config):
    learns_from: ClassVar[str] = PROMPTS

    data: sections.PromptDataConfig = group(sections.PromptDataConfig)
    model: sections.PolicyModelConfig = group(sections.PolicyModelConfig)
    algo: AlgoConfig = group(AlgoConfig)
    rollout: sections.RolloutConfig = group(sections.RolloutConfig)
    reward: sections.RewardConfig = group(sections.RewardConfig)
    filter: sections.FilterConfig = group(sections.FilterConfig)
    reference: sections.ReferenceConfig = group(sections.ReferenceConfig)
    weights: sections.WeightsConfig = group(sections.WeightsConfig)
    driver: sections.DriverConfig = group(sections.DriverConfig)
    eval: sections.RolloutEvalConfig = group(sections.RolloutEvalConfig)
    observability: sections.RolloutObservabilityConfig = group(sections.RolloutObservabilityConfig)

    @property
    def returned_experts(self) -> str | None:
        """The option by which engines return the experts that they chose; None where they don't."""
        if self.algo.router_replay:
            return "algo.router_replay=true"
        return "rollout.return_experts=true" if self.rollout.return_experts else None


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """Policy gradient whose estimator needs a critic's values."""

    algo: PPOAlgoConfig = group(PPOAlgoConfig)
    critic: sections.CriticConfig = group(sections.CriticConfig)


@dataclass(frozen=True)
class GroupsConfig(Config):
    """Policy gradient on groups with given rewards: what the data make of a PolicyGradientConfig."""

    learns_from: ClassVar[str] = GROUPS

    model: sections.PolicyModelConfig = group(sections.PolicyModelConfig)
    algo: GroupsAlgoConfig = group(GroupsAlgoConfig)
    rollout: sections.SampledConfig = group(sections.SampledConfig)
    filter: sections.KeptConfig = group(sections.KeptConfig)
    reference: sections.ReferenceConfig = group(sections.ReferenceConfig)


@dataclass(frozen=True)
class PairsConfig(Config):
    """DPO, and what its kin share."""

    learns_from: ClassVar[str] = PAIRS

    data: sections.PairDataConfig = group(sections.PairDataConfig)
    model: sections.PolicyModelConfig = group(sections.PolicyModelConfig)
    algo: PairsAlgoConfig = group(PairsAlgoConfig)
    reference: sections.ReferenceConfig = group(sections.ReferenceConfig)
    eval: sections.EvalConfig = group(sections.EvalConfig)


@dataclass(frozen=True)
class IPOConfig(PairsConfig):
    algo: IPOAlgoConfig = group(IPOAlgoConfig)


@dataclass(frozen=True)
class CDPOConfig(PairsConfig):
    algo: CDPOAlgoConfig = group(CDPOAlgoConfig)


@dataclass(frozen=True)
class RewardModelConfig(Config):
    learns_from: ClassVar[str] = PAIRS
    is_score: ClassVar[bool] = True

    data: sections.PairDataConfig = group(sections.PairDataConfig)
    algo: RewardModelAlgoConfig = group(RewardModelAlgoConfig)
    train: sections.RewardModelTrainConfig = group(sections.RewardModelTrainConfig)
    eval: sections.EvalConfig = group(sections.EvalConfig)


@dataclass(frozen=True)
class SFTConfig(Config):
    learns_from: ClassVar[str] = EXAMPLES

    data: sections.ExampleDataConfig = group(sections.ExampleDataConfig)
    model: sections.PolicyModelConfig = group(sections.PolicyModelConfig)
    algo: SFTAlgoConfig = group(SFTAlgoConfig)
    train: sections.SFTTrainConfig = group(sections.SFTTrainConfig)
    eval: sections.EvalConfig = group(sections.EvalConfig)


PolicyAlgo = AlgoConfig | GroupsAlgoConfig        # what a policy gradient's advantages and loss are told
PolicyConfig = PolicyGradientConfig | GroupsConfig
OnPairs = PairsConfig | RewardModelConfig
ReferencedConfig = PolicyGradientConfig | GroupsConfig | PairsConfig
EvaluatedConfig = PolicyGradientConfig | PairsConfig | RewardModelConfig | SFTConfig
C = TypeVar("C", bound=Config)

#: What algo.name means, where it isn't an algorithm of policy gradient.
OBJECTIVES: dict[str, type[Config]] = {
    "ppo": PPOConfig, "sft": SFTConfig, "dpo": PairsConfig, "ipo": IPOConfig, "cdpo": CDPOConfig,
    "reward_model": RewardModelConfig,
}
#: Those that sample nothing.
OFFLINE = tuple(name for name, cls in OBJECTIVES.items() if cls.learns_from != PROMPTS)


def objective_of(name: str) -> type[Config]:
    return OBJECTIVES.get(names.ALGORITHM_ALIASES.get(name, name), PolicyGradientConfig)
