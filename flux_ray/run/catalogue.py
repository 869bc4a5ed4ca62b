"""Every metric that a run may write, gathered from beside the code that computes each.

Takes:  the METRICS of the modules that compute them.
Gives:  `SECTIONS`, in the order of docs/metrics.md; `find`, what a name means.
Never:  describes a metric itself, but for what evaluations and other libraries' runs take over under another name.
"""

from __future__ import annotations

from collections.abc import Iterator

from flux_ray import algo
from flux_ray.algo import preferences
from flux_ray.driver import drop_stats, evaluation, loop, measure, ranks
from flux_ray.model import routing
from flux_ray.observability import gpus, reward_metrics
from flux_ray.observability.described import Described, renamed
from flux_ray.train import engine, sft_step

OF_TRL = Described("trl/NAME", "what TRL calls NAME, where none of ours means the same", "", "`backend=\"trl\"`")


def _starting(*prefixes: str) -> tuple[Described, ...]:
    everything = (*reward_metrics.METRICS, *measure.METRICS, *reward_metrics.LENGTHS, *algo.METRICS, *engine.METRICS,
                  *engine.OF_CRITIC, *ranks.METRICS, *loop.METRICS, *drop_stats.METRICS, *preferences.METRICS,
                  *sft_step.METRICS)
    return tuple(one for one in everything if one.name.startswith(prefixes))


def _of_evaluations() -> Iterator[Described]:
    """Those of an evaluation are measured as in training, over its own data."""
    taken = (*reward_metrics.METRICS, *reward_metrics.LENGTHS, *preferences.METRICS, *sft_step.METRICS)
    for one in taken:
        yield renamed(one, f"eval/{one.name.partition('/')[2]}", otherwise=f"as `{one.name}`")
    yield Described("eval/SET/NAME", "the same of each set, where `eval.data` names several; also `eval/SET/NAME/PART`")
    yield Described("eval/SET/NAME/PART", "the same of each set")


_WITHOUT_ROLLOUTS = ("train/loss", "train/num_tokens", "pairs/")
_TIMES = ("driver/", "train/step_s", "filter/")
_AGREE = ("weights/logprob_gap", "weights/publish_s")

#: Heading ► its metrics.
SECTIONS: dict[str, tuple[Described, ...]] = {
    "Rewards and responses, of the step's batch": _starting("reward/", "rollout/", "reference/"),
    "The policy": _starting("actor/") + engine.METRICS,
    "The routers of a mixture of experts": routing.METRICS,
    "The critic (PPO)": _starting("critic/"),
    "Whether engine and trainer agree": _starting(*_AGREE),
    "Time, staleness, what was dropped": _starting(*_TIMES),
    "GPUs": gpus.METRICS,
    "Supervised training and preferences": _starting(*_WITHOUT_ROLLOUTS),
    "Evaluations, of the policy as it is": (*evaluation.METRICS, *_of_evaluations()),
    "Other libraries' runs": (OF_TRL,),
}

ALL = tuple(one for section in SECTIONS.values() for one in section)


def find(name: str) -> Described | None:
    """What a run's metric of that name is: the one that is called so, before one with a placeholder."""
    fits = [one for one in ALL if one.fits(name)]
    return min(fits, key=lambda one: (one.name != name, len(one.name.split("/")))) if fits else None


def heading_of(one: Described) -> str:
    return next(heading for heading, section in SECTIONS.items() if one in section)
