"""Calls by which people start a training elsewhere.

Gives:  `create_sft_trainer`.
"""

from __future__ import annotations

from typing import Any

from flux_ray.api import FluxTrainer, create_rl_trainer


def create_sft_trainer(*, model_name: str, dataset_name: str, backend: str = "ray", **options: Any) -> FluxTrainer:
    """Make a trainer that learns completions: `create_rl_trainer` with the algorithm sft.

    Args:
        model_name: A local folder or a name of the hub.
        dataset_name: A file or a name of the hub.
        backend: As FluxTrainer has it.
        options: As FluxConfig has them.

    Examples:
        >>> create_sft_trainer(model_name="Qwen/Qwen3-0.6B", dataset_name="data.jsonl", num_steps=9).config.algo.name
        'sft'
    """
    return create_rl_trainer(
        model_name=model_name, dataset_name=dataset_name, algorithm="sft", backend=backend, **options)
