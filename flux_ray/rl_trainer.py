"""One call from a model's and a data set's name to a trainer, on a backend of choice.

Takes:  names of model, data set, algorithm and backend; rewards; further options as FluxConfig takes them.
Gives:  `create_rl_trainer(...)`, whose result has `.config` and `.train()` ► TrainingResult.
Knows:  which backends there are: ours on Ray, TRL's trainers, TRL's on a model that Unsloth opened.
Never:  starts anything before `.train()`; what can be refused is refused when the trainer is created.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flux_ray import algo, names
from flux_ray.api import FluxConfig, FluxTrainer, Reward, outside_loop
from flux_ray.config import Config
from flux_ray.errors import UserError, unknown
from flux_ray.observability.callbacks import Callback, Metrics, as_callback

if TYPE_CHECKING:
    from flux_ray.run import TrainingResult

BACKENDS = ("ray", "trl", "unsloth")


class RLTrainer:
    """What `create_rl_trainer` gives."""

    def __init__(self, config: Config, *, backend: str, rewards: Reward | Sequence[Reward] | None) -> None:
        self._trainer = FluxTrainer(config, rewards=rewards)
        self.backend = backend

    @property
    def config(self) -> Config:
        return self._trainer.config

    def train(self, *, callbacks: Sequence[Callback | Callable[[int, Metrics], None]] = ()) -> TrainingResult:
        """Train to the end. UserError for what the user can mend, before anything is started where it can be known."""
        if self.backend == "ray":
            return self._trainer.fit(callbacks=callbacks)
        from flux_ray.backends import trl, unsloth

        run = {"trl": trl.train, "unsloth": unsloth.train}[self.backend]
        config = self._trainer.prepare(None)
        return outside_loop(functools.partial(run, callbacks=[as_callback(callback) for callback in callbacks]), config)


def create_rl_trainer(
    *, model_name: str, dataset_name: str, algorithm: str = "grpo", backend: str = "ray",
    reward_model_name: str | None = None, rewards: Reward | Sequence[Reward] | None = None, **options: Any,
) -> RLTrainer:
    """A trainer of `model_name` on `dataset_name` (a file, or a hub data set).

    `rewards`: as FluxTrainer has them, beside the reward model if both are given; `reward_model_name`: a folder or hub
    name of a sequence classification model with one label; `options`: as FluxConfig has them. algorithm="dpo" (ipo,
    cdpo, reward_model) learns from preference rows (chosen, rejected); for the others such rows, without a prompt
    column, give the prompt that both share.

    >>> trainer = create_rl_trainer(model_name="Qwen/Qwen3-0.6B", dataset_name="data.jsonl", algorithm="drgrpo")
    >>> trainer.backend, trainer.config.algo.name
    ('ray', 'dr_grpo')

    Raises UserError: an unknown algorithm or backend (with the nearest), an option that the backend hasn't, a reward
    model where another one is named too or nothing is scored.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    config = FluxConfig(model_path=model_name, algorithm=algorithm, **{"data.train": dataset_name}, **options)
    if config.algo.name not in algo.KINDS and not config.plugins:   # a plugin's are known where it is loaded
        algo.resolve(config.algo)
    if reward_model_name is not None:
        rewards = _with_model(config, rewards, reward_model_name)
    if backend != "ray":
        from flux_ray.backends.trl_settings import check_trl, check_unsloth

        if algo.needs_critic(config.algo) or reward_model_name is not None:
            what = f"no {algorithm}: it has no critic" if algo.needs_critic(config.algo) else "no reward models"
            raise UserError(f"backend={backend} has {what}; use backend=ray (ours, the default)")
        check_trl(config)
        if backend == "unsloth":
            check_unsloth(config)
    return RLTrainer(config, backend=backend, rewards=rewards)


def _with_model(config: Config, rewards: Reward | Sequence[Reward] | None, model: str) -> list[Reward]:
    """The run's rewards with the model among them. UserError where nothing is scored, or by another model too."""
    if config.algo.name in algo.KINDS:
        raise UserError(f"reward_model_name={model!r}: algorithm {config.algo.name!r} scores nothing: leave it out")
    several: list[Reward] = list(config.reward.functions)
    if rewards is not None:
        several = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    named = f"{names.REWARD_MODEL}{model}"
    for reward in several:
        if isinstance(reward, str) and names.reward_model_path(reward) not in (None, model):
            raise UserError(f"reward_model_name={model!r} and reward.functions' {reward!r} are two reward models: give "
                            "both in reward.functions, with reward.weights, or one of them")
    return several if named in several else [*several, named]
