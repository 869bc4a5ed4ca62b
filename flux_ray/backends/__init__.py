"""Other libraries that can run a config: TRL and Unsloth, in one process and without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flux_ray.config import Config, PPOConfig
from flux_ray.errors import UserError, unknown

if TYPE_CHECKING:
    from flux_ray.run import TrainingResult

BACKENDS = ("ray", "trl", "unsloth")


def chosen(backend: str, config: Config) -> str:
    """The backend; `auto` is ours. UserError for an unknown one, and for a config that TRL or Unsloth can't run."""
    backend = "ray" if backend == "auto" else backend
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "ray":
        return backend
    from flux_ray.backends.trl_settings import check_trl, check_unsloth

    if isinstance(config, PPOConfig):
        raise UserError(f"backend={backend} has no {config.algo.name}: it has no critic; use backend=ray (ours, the "
                        "default)")
    check_trl(config)
    if backend == "unsloth":
        check_unsloth(config)
    return backend


def runner(backend: str) -> Callable[..., TrainingResult]:
    """The function that trains on that backend: (config, callbacks=...)."""
    if backend == "ray":
        from flux_ray import run as runs

        return runs.run
    from flux_ray.backends import trl, unsloth

    return {"trl": trl.train, "unsloth": unsloth.train}[backend]
