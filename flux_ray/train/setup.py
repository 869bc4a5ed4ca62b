"""One rank's place in the training group, and DeepSpeed's settings from ours.

Takes:  Config, a rank and where the group meets; for settings the Config alone.
Gives:  `join` (the process group, with a deadline), `deepspeed_config`, `check_deepspeed_options`, `learning_rate`.
Knows:  which of DeepSpeed's keys are ours; that bf16 needs ZeRO 1 for fp32 master weights and gradients.
Never:  imports deepspeed before the environment says which device it is for (it looks once, at import).
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flux_ray import ports
from flux_ray.config import Config, TrainConfig
from flux_ray.config.libraries import fields, refuse_unknown, trees
from flux_ray.errors import UserError

#: DeepSpeed's keys that come from elsewhere in our config, and where they are set instead
OWN_KEYS = {
    "train_batch_size": "batch.prompts_per_step",
    "train_micro_batch_size_per_gpu": "batch.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "batch.max_tokens_per_micro_batch",
    "managed_gradient_accumulation": "batch.max_tokens_per_micro_batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.adam_betas, train.adam_eps and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types.grad_accum_dtype": "model.dtype",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.compute_grad_norm": "train.max_grad_norm (every update's norm is measured)",
}


def check_deepspeed_options(config: Config) -> None:
    """UserError for a key of `train.deepspeed` that we set ourselves, naming the option that sets it, and for one that
    DeepSpeed doesn't have: at its top level it would pass over it in silence."""
    given = config.train.deepspeed
    for key, value in _leaves(given):
        for own, where in OWN_KEYS.items():
            if key == own or key.startswith(own + "."):
                raise UserError(f"train.deepspeed.{key}={value!r} is set by {where}: leave it out of train.deepspeed")
    if not given:
        return
    ours: dict[str, Any] = {"library": "DeepSpeed", "not_offered": OWN_KEYS}
    refuse_unknown(given, _top_level_keys(), option="train.deepspeed", **ours)
    if isinstance(given.get("zero_optimization"), dict):
        refuse_unknown(given["zero_optimization"], _zero_keys(), option="train.deepspeed.zero_optimization", **ours)


def _top_level_keys() -> frozenset[str]:
    """Every name that stands in quotes where DeepSpeed reads its config: its keys, and more than its keys."""
    nodes = (node for tree in trees("deepspeed", "**/constants.py", "**/*config.py") for node in ast.walk(tree))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(text for text in texts if text.isidentifier())


def _zero_keys() -> frozenset[str]:
    """The fields of DeepSpeed's own class for `zero_optimization`, and the older names that they go by."""
    files = trees("deepspeed", "runtime/zero/config.py")
    older = {str(node.value.value) for tree in files for node in ast.walk(tree)
             if isinstance(node, ast.keyword) and node.arg == "alias" and isinstance(node.value, ast.Constant)}
    return fields(files) | older


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def zero_stage(config: Config, dtype: torch.dtype) -> int:
    """DeepSpeed's stage. In bf16 stage 0 runs as 1: only there are master weights and accumulated gradients fp32."""
    return max(config.train.zero_stage, 1) if dtype == torch.bfloat16 else config.train.zero_stage


def deepspeed_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own config: ours, with the user's further options merged in."""
    check_deepspeed_options(config)
    stage = zero_stage(config, dtype)
    ours: dict[str, Any] = {
        # Micro-batches are packed by tokens and their weights carry the aggregation, so DeepSpeed scales by nothing:
        # one micro-batch a step as far as it knows, and the boundary is said by hand.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        # Without ZeRO the norm is taken (and clipped) by us: DeepSpeed keeps none there.
        "gradient_clipping": config.train.max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Where its state is offloaded DeepSpeed asks for an AdamW of its own, built by a compiler at the first start;
        # torch's runs on the CPU as well. Can be set again.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # never: metrics are the driver's to print
    }
    if dtype == torch.bfloat16:
        # Summed over micro-batches and over ranks in fp32: which rank had which groups is not to show in the gradient.
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
                 "communication_data_type": "fp32"}
    return _merged(ours, config.train.deepspeed)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both_trees = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both_trees else value
    return result


def learning_rate(train: TrainConfig, update: int, total_updates: int) -> float:
    """The rate of update 0, 1, 2 …: a linear rise over warmup_steps, then constant or falling to 0 at total_updates."""
    if update < train.warmup_steps:
        return train.learning_rate * (update + 1) / train.warmup_steps
    progress = min((update - train.warmup_steps) / max(total_updates - train.warmup_steps, 1), 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.learning_rate * factor


def join(config: Config, *, rank: int, world_size: int, master_address: str, master_port: int, device: str) -> Any:
    """Meet the other ranks; gives the deepspeed module, imported for this device.

    Every later collective fails after train.deadline_s seconds: whoever waits then waits for a rank that has died.
    """
    on_cpu = not device.startswith("cuda")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0" if on_cpu else str(torch.device(device).index or 0), WORLD_SIZE=str(world_size),
        MASTER_ADDR=master_address, MASTER_PORT=str(master_port), DS_ACCELERATOR="cpu" if on_cpu else "cuda",
    )
    torch.set_num_threads(config.train.num_threads)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if on_cpu:
        # DeepSpeed would compile a shared-memory helper for gloo at the first start, half a minute with a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    backend, timeout = "gloo" if on_cpu else "nccl", timedelta(seconds=config.train.deadline_s)
    if not dist.is_initialized():  # one that trained before has met them
        meeting = _meeting_point(master_address, master_port, rank=rank, world_size=world_size, timeout=timeout)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return deepspeed


def _meeting_point(address: str, port: int, *, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Rank 0 answers at the port: on the socket that holds it, or on one of its own where it was only said to be free.

    Who comes later in this process and asks for the same place gets the same store.
    """
    held = ports.taken(port) if rank == 0 else None
    return dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, multi_tenant=True,
                         master_listen_fd=held.detach() if held else None)
