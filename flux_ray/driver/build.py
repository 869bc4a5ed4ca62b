"""From a prepared config to live rooms.

Takes:  Prepared, a Cluster that is connected.
Gives:  PolicyRooms, SamplingRooms or OfflineRooms, loaded and connected; the cluster ends them.
Knows:  which class runs in which role, and what each is told; everything that can start at once does.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from flux_ray import algo
from flux_ray.cluster.on_ray import Cluster, EngineCaller, RayGroup
from flux_ray.cluster.plan import ENGINE, REFERENCE, REWARD, TRAINER, Plan, Role
from flux_ray.config import Config
from flux_ray.driver.offline_rooms import OfflineRooms
from flux_ray.driver.preflight import Prepared
from flux_ray.driver.roles import ReferencePolicy, TrainingRank
from flux_ray.driver.rooms import PolicyRooms, SamplingRooms, TrainingRooms
from flux_ray.driver.state import TRAINER as TRAINER_FOLDER
from flux_ray.model import context_length, resolve_dtype
from flux_ray.reward import RewardWorker
from flux_ray.rollout.engine import RolloutEngine, check_kv_cache, engine_env


def check_engines(prepared: Prepared, plan: Plan) -> None:
    """What only the plan and the data together can tell, before an actor starts. UserError."""
    config = prepared.config
    if plan.role(ENGINE) is None or plan.device != "cpu":
        return
    path = str(config.model.path)
    dtype_bytes = resolve_dtype(config.model.dtype, plan.device).itemsize
    context = _context(prepared) or context_length(path)
    check_kv_cache(path, context=context, dtype_bytes=dtype_bytes, kv_cache_gib=config.rollout.kv_cache_gib)


async def policy_rooms(prepared: Prepared, cluster: Cluster, plan: Plan) -> PolicyRooms:
    """All four roles, started side by side; then the wire from trainer to engines."""
    config = prepared.config
    groups = {role.name: _spawn(config, cluster, plan, role) for role in plan.roles}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_build_sender(prepared, plan, groups[TRAINER]))
        tasks.create_task(_build_engines(prepared, plan, groups[ENGINE]))
        tasks.create_task(_build_rewards(config, groups[REWARD]))
        if REFERENCE in groups:
            tasks.create_task(_build_reference(config, plan, groups[REFERENCE]))
    await _connect(config, plan, groups[TRAINER], groups[ENGINE])
    return PolicyRooms(
        config, engines=groups[ENGINE], rewards=groups[REWARD], reference=groups.get(REFERENCE), trainer=groups[TRAINER]
    )


async def sampling_rooms(prepared: Prepared, cluster: Cluster, plan: Plan) -> SamplingRooms:
    """Engines and reward workers; the engines serve the weights that they loaded."""
    config = prepared.config
    groups = {role.name: _spawn(config, cluster, plan, role) for role in plan.roles}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_build_engines(prepared, plan, groups[ENGINE]))
        tasks.create_task(_build_rewards(config, groups[REWARD]))
    return SamplingRooms(config, engines=groups[ENGINE], rewards=groups[REWARD])


def _spawn(config: Config, cluster: Cluster, plan: Plan, role: Role) -> RayGroup:
    may_die = role.name == REWARD and config.reward.on_failure == "drop"  # it is replaced
    return cluster.spawn(role, env=_env(config, plan, role.name), may_die=may_die)


async def offline_rooms(prepared: Prepared, cluster: Cluster, plan: Plan) -> OfflineRooms:
    """The training ranks, and reference actors where they are asked for."""
    config = prepared.config
    groups = {role.name: _spawn(config, cluster, plan, role) for role in plan.roles}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_build_trainer(prepared, plan, groups[TRAINER]))
        if REFERENCE in groups:
            tasks.create_task(_build_reference(config, plan, groups[REFERENCE]))
    return OfflineRooms(config, trainer=groups[TRAINER], reference=groups.get(REFERENCE))


async def _build_trainer(prepared: Prepared, plan: Plan, trainer: RayGroup) -> None:
    config, deadline_s = prepared.config, prepared.config.cluster.start_deadline_s
    address, port = await trainer.address(0, deadline_s=deadline_s)
    await trainer.build(
        TrainingRank,
        [
            {
                "config": config,
                "rank": rank,
                "world_size": trainer.size,
                "master_address": address,
                "master_port": port,
                "device": "cuda:0" if plan.device == "cuda" else "cpu",
                "weights_backend": plan.weights_backend,
            }
            for rank in range(trainer.size)
        ],
        deadline_s=deadline_s,
    )
    if prepared.checkpoint is not None:
        await TrainingRooms(config, trainer).load_checkpoint(prepared.checkpoint / TRAINER_FOLDER)


async def _build_sender(prepared: Prepared, plan: Plan, trainer: RayGroup) -> None:
    await _build_trainer(prepared, plan, trainer)
    await trainer.call_all("prepare_wire", deadline_s=prepared.config.cluster.start_deadline_s)


async def _build_engines(prepared: Prepared, plan: Plan, engines: RayGroup) -> None:
    config, role = prepared.config, plan.role(ENGINE)
    assert role is not None
    rollout = dataclasses.replace(config.rollout, max_model_len=_context(prepared))
    arguments: dict[str, Any] = {
        "config": dataclasses.replace(config, rollout=rollout),
        "device": plan.device,
        "dtype": _dtype_name(config.model.dtype, plan.device),
        "weights_backend": plan.weights_backend,
        "gpu_share": role.gpus if role.gpus else 1.0,
    }
    each = [{**arguments, "index": index} for index in range(engines.size)]
    await engines.build(RolloutEngine, each, deadline_s=config.cluster.start_deadline_s)
    await engines.call_all("start", deadline_s=config.cluster.start_deadline_s)


def _context(prepared: Prepared) -> int | None:
    """Tokens that an engine must have room for: it holds the KV of its whole context, and a model's own may be huge.

    None (the model's own) for rollouts of a user's, which may see more tokens than they sample.
    """
    rollout = prepared.config.rollout
    if rollout.max_model_len or rollout.function != "single_turn":
        return rollout.max_model_len
    sources = [source for source in (prepared.prompts, prepared.eval_prompts) if source is not None]
    longest = max(source.longest_prompt for source in sources) + rollout.max_tokens
    return min(longest, context_length(str(prepared.config.model.path)))


async def _build_rewards(config: Config, rewards: RayGroup) -> None:
    arguments = {"config": config, "tokenizer_path": config.model.tokenizer or config.model.path}
    await rewards.build(RewardWorker, [arguments] * rewards.size, deadline_s=config.cluster.start_deadline_s)


async def _build_reference(config: Config, plan: Plan, reference: RayGroup) -> None:
    device = "cuda:0" if plan.device == "cuda" else "cpu"
    dtype = resolve_dtype(config.model.dtype if config.reference.dtype == "auto" else config.reference.dtype, device)
    arguments: dict[str, Any] = {
        "path": config.reference.path or config.model.path,
        "dtype": dtype,
        "device": device,
        # Pairs were not sampled here: their log-probs are the model's own.
        "temperature": 1.0 if algo.kind_of(config.algo).data == algo.PAIRS else config.rollout.temperature,
        "max_tokens_per_forward": config.reference.max_tokens_per_forward,
        "attention": config.model.attention,
        "layout": config.model.layout,
        "chunk_tokens": config.model.logprob_chunk_tokens,
    }
    await reference.build(ReferencePolicy, [arguments] * reference.size, deadline_s=config.cluster.start_deadline_s)


async def _connect(config: Config, plan: Plan, trainer: RayGroup, engines: RayGroup) -> None:
    """Open the wire: rank 0 meets every engine worker; the other ranks only learn that they needn't."""
    deadline_s = config.weights.deadline_s
    address, port = await trainer.address(0, deadline_s=deadline_s)
    call = EngineCaller(engines.actors, deadline_s)
    await trainer.call_all(
        "connect",
        call,
        workers_per_engine=[config.rollout.tensor_parallel_size] * engines.size,
        address=address,
        port=port,
        wire_dtype=_dtype_name(config.model.dtype, plan.device),
        deadline_s=deadline_s,
    )


def _env(config: Config, plan: Plan, role: str) -> dict[str, str]:
    """Environment of a role's actors:

    one OpenMP thread on CPU, whatever the machine has, and the user's own variables.
    """
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if plan.device == "cpu":
        threads = config.train.num_threads if role == TRAINER else 1
        env |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    if role in (ENGINE, TRAINER):  # rank 0 of the trainer imports vLLM as well
        env = engine_env(plan.device, tensor_parallel_size=config.rollout.tensor_parallel_size) | env
    return env | config.cluster.env


def _dtype_name(name: str, device: str) -> str:
    return str(resolve_dtype(name, device)).removeprefix("torch.")
