"""The training group: DeepSpeed under one Trainer per rank."""

from flux_ray.train.critic import Critic
from flux_ray.train.setup import Place, check_deepspeed_options
from flux_ray.train.trainer import Trainer

__all__ = ["Critic", "Place", "Trainer", "check_deepspeed_options"]
