"""What each objective learns from, and which model it trains.

Takes:  an AlgoConfig.
Gives:  `kind_of`: data, model, whether a frozen reference is asked, which options of algo it reads.
Knows:  every algorithm that isn't in the table learns from prompts (or from groups that were rolled out before).
Never:  computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flux_ray.config import AlgoConfig, Config

PROMPTS, EXAMPLES, PAIRS = "prompts", "examples", "pairs"  # data: one of these words
POLICY, SCORE = "policy", "score"  # model: gives log-probs, or one score a token


@dataclass(frozen=True)
class Kind:
    """An objective beside reinforcement learning's: no advantage, no policy loss of the registries."""

    data: str
    model: str = POLICY
    has_reference: bool = False
    reads: tuple[str, ...] = ()  # options of algo beside its name


REINFORCEMENT = Kind(PROMPTS)

KINDS: dict[str, Kind] = {
    "sft": Kind(EXAMPLES),
    "dpo": Kind(PAIRS, has_reference=True, reads=("beta", "reference_free")),
    "ipo": Kind(PAIRS, has_reference=True, reads=("beta", "reference_free", "pair_logprobs")),
    "cdpo": Kind(PAIRS, has_reference=True, reads=("beta", "reference_free", "label_smoothing")),
    "reward_model": Kind(PAIRS, model=SCORE),
}


def kind_of(config: AlgoConfig) -> Kind:
    return KINDS.get(config.name, REINFORCEMENT)


def needs_reference(config: AlgoConfig) -> bool:
    """Whether any term asks for the frozen policy's log-probs."""
    kind = kind_of(config)
    if kind is not REINFORCEMENT:
        return kind.has_reference and not config.reference_free
    return config.beta > 0 or config.kl_coef > 0


def reference_is_base(config: Config) -> bool:
    """Whether the reference that is asked for is the policy without its adapter: the training ranks have it already."""
    return needs_reference(config.algo) and config.train.lora.rank > 0 and config.reference.path is None
