"""Meeting the other training ranks, and DeepSpeed's settings from ours.

Takes:  the section `train`; a rank, and where the group meets.
Gives:  `join` (the process group, with a deadline) and `leave`; `deepspeed_config`, `check_deepspeed_options`,
        `learning_rate`.
Knows:  which of DeepSpeed's keys are ours; that bf16 needs ZeRO 1 for fp32 master weights and gradients.
Never:  imports deepspeed before the environment says which device it is for (it looks once, at import).
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache, partial
from types import ModuleType
from typing import TypedDict

import torch
import torch.distributed as dist

from flux_ray import ports
from flux_ray.config import TrainConfig
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


def check_deepspeed_options(config: TrainConfig) -> None:
    """UserError for a key of `train.deepspeed` that we set ourselves, or that DeepSpeed doesn't have.

    At its top level DeepSpeed would ignore an unknown key in silence.
    """
    given = config.deepspeed
    for key, value in _leaves(given):
        for own, where in OWN_KEYS.items():
            if key == own or key.startswith(own + "."):
                raise UserError(f"train.deepspeed.{key}={value!r} is set by {where}: leave it out of train.deepspeed")
    if not given:
        return
    refuse = partial(refuse_unknown, library="DeepSpeed", not_offered=OWN_KEYS)
    refuse(given, _top_level_keys(), option="train.deepspeed")
    if isinstance(given.get("zero_optimization"), dict):
        refuse(given["zero_optimization"], _zero_keys(), option="train.deepspeed.zero_optimization")


@cache
def _top_level_keys() -> frozenset[str]:
    """Every name in quotes in the files that read DeepSpeed's config: its keys, and some that are none."""
    nodes = (node for tree in trees("deepspeed", "**/constants.py", "**/*config.py") for node in ast.walk(tree))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(text for text in texts if text.isidentifier())


@cache
def _zero_keys() -> frozenset[str]:
    """The fields of DeepSpeed's own class for `zero_optimization`, and their older names."""
    files = trees("deepspeed", "runtime/zero/config.py")
    older = {str(node.value.value) for tree in files for node in ast.walk(tree)
             if isinstance(node, ast.keyword) and node.arg == "alias" and isinstance(node.value, ast.Constant)}
    return fields(files) | older


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def zero_stage(config: TrainConfig, dtype: torch.dtype) -> int:
    """DeepSpeed's stage. In bf16 stage 0 runs as 1: only there are master weights and accumulated gradients fp32."""
    return max(config.zero_stage, 1) if dtype == torch.bfloat16 else config.zero_stage


def deepspeed_config(config: TrainConfig, dtype: torch.dtype) -> dict[str, object]:
    """DeepSpeed's own config: ours, with the user's further options merged in."""
    check_deepspeed_options(config)
    stage = zero_stage(config, dtype)
    ours: dict[str, object] = {
        # Micro-batches are packed by tokens and their weights carry the aggregation, so DeepSpeed must not scale: it
        # is told of one micro-batch a step, and we set the boundary by hand.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        # Without ZeRO we take the norm and clip: DeepSpeed keeps no norm there.
        "gradient_clipping": config.max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Where its state is offloaded, DeepSpeed wants an AdamW of its own, built by a compiler at the first start;
        # torch's runs on the CPU as well. A user may set this.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # never: metrics are the driver's to print
    }
    if dtype == torch.bfloat16:
        # Summed over micro-batches and ranks in fp32: the gradient must not depend on which rank had which groups.
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
                 "communication_data_type": "fp32"}
    return _merged(ours, config.deepspeed)


def _merged(ours: Mapping[str, object], theirs: Mapping[str, object]) -> dict[str, object]:
    result = dict(ours)
    for key, value in theirs.items():
        own = result.get(key)
        result[key] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
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


class Place(TypedDict):
    """A rank's place in its group."""

    rank: int
    world_size: int
    master_address: str  # of rank 0
    master_port: int
    device: str


def join(config: TrainConfig, *, rank: int, world_size: int, master_address: str, master_port: int, device: str
         ) -> ModuleType:
    """Meet the other ranks; gives the deepspeed module, imported for this device.

    Every later collective fails after train.deadline_s seconds: a rank that waits so long waits for one that has died.
    """
    on_cpu = not device.startswith("cuda")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0" if on_cpu else str(torch.device(device).index or 0), WORLD_SIZE=str(world_size),
        MASTER_ADDR=master_address, MASTER_PORT=str(master_port), DS_ACCELERATOR="cpu" if on_cpu else "cuda",
    )
    torch.set_num_threads(config.num_threads)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if on_cpu:
        # DeepSpeed would compile a shared-memory helper for gloo at the first start, half a minute with a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _import_muon()
    else:
        torch.cuda.set_device(device)
    backend, timeout = "gloo" if on_cpu else "nccl", timedelta(seconds=config.deadline_s)
    if not dist.is_initialized():  # one that trained before has met them
        meeting = _meeting_point(master_address, master_port, rank=rank, world_size=world_size, timeout=timeout)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return deepspeed


def _import_muon() -> None:
    """ZeRO asks of each optimizer whether it is Muon, which compiles functions where it defines them: torch's compiler
    would be imported for that, three seconds of a rank's start. Here they stay as they are."""
    compiles = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiles


def leave() -> None:
    """Leave the group that `join` met, if it did. DeepSpeed too forgets the groups that it has made of its ranks: a
    later `join` in this process would use them."""
    if dist.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def _meeting_point(address: str, port: int, *, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store by which ranks meet. Rank 0 answers at the port: on the socket that holds it, or else on a new one.

    A later caller in this process that asks for the same place gets the same store.
    """
    held = ports.taken(port) if rank == 0 else None
    return dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, multi_tenant=True,
                         master_listen_fd=held.detach() if held else None)
