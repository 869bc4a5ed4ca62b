"""flux_ray: reinforcement-learning post-training of language models on Ray, vLLM and DeepSpeed.

Gives:  the Python API below, each name loaded when it is first used, so that `import flux_ray` costs nothing.
Never:  starts anything, or imports torch, Ray, vLLM or DeepSpeed, by being imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_ray.algo import register_adv_estimator, register_policy_loss
    from flux_ray.api import FluxConfig, FluxTrainer, create_rl_trainer
    from flux_ray.config import Config
    from flux_ray.errors import UserError
    from flux_ray.evaluations import evaluate
    from flux_ray.further import create_sft_trainer
    from flux_ray.observability.callbacks import Callback
    from flux_ray.observability.monitors import Monitor, register_monitor
    from flux_ray.reward import register_reward
    from flux_ray.rollout.functions import register_rollout
    from flux_ray.run import TrainingResult

#: Public name ► the module that has it.
_HOMES = {
    "Callback": "flux_ray.observability.callbacks",
    "Config": "flux_ray.config",
    "FluxConfig": "flux_ray.api",
    "FluxTrainer": "flux_ray.api",
    "Monitor": "flux_ray.observability.monitors",
    "TrainingResult": "flux_ray.run",
    "UserError": "flux_ray.errors",
    "create_rl_trainer": "flux_ray.api",
    "create_sft_trainer": "flux_ray.further",
    "evaluate": "flux_ray.evaluations",
    "register_adv_estimator": "flux_ray.algo",
    "register_monitor": "flux_ray.observability.monitors",
    "register_policy_loss": "flux_ray.algo",
    "register_reward": "flux_ray.reward",
    "register_rollout": "flux_ray.rollout.functions",
}

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "Config",
    "FluxConfig",
    "FluxTrainer",
    "Monitor",
    "TrainingResult",
    "UserError",
    "create_rl_trainer",
    "create_sft_trainer",
    "evaluate",
    "register_adv_estimator",
    "register_monitor",
    "register_policy_loss",
    "register_reward",
    "register_rollout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flux_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})   # the rest is our own
