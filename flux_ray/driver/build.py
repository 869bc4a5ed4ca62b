"""From a prepared config to live rooms.

Takes:  Prepared, a Cluster that is connected.
Gives:  PolicyRooms, SamplingRooms or OfflineRooms, loaded and connected; the cluster ends them.
Knows:  which class runs in which role, and what each is told; everything that can start at once does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

from flux_ray import algo
from flux_ray.cluster.on_ray import Cluster, EngineCaller, ModelCaller, RayGroup
from flux_ray.cluster.plan import CRITIC, ENGINE, REFERENCE, REWARD, REWARD_MODEL, TRAINER, Plan, Role
from flux_ray.config import Config
from flux_ray.driver.offline_rooms import OfflineRooms
from flux_ray.driver.preflight import Prepared
from flux_ray.driver.roles import CriticRank, ReferencePolicy, TrainingRank
from flux_ray.driver.rooms import PolicyRooms, SamplingRooms
from flux_ray.model import context_length, resolve_dtype
from flux_ray.names import reward_model_path, reward_name
from flux_ray.reward import RewardWorker
from flux_ray.reward.model import RewardModel
from flux_ray.rollout.check import check_kv_cache
from flux_ray.rollout.engine import RolloutEngine, engine_env

#: On CPU glibc gives each large tensor's memory back and takes it again, a page fault for every 4 KiB: a tenth of a
#: training step. Told so, it keeps what it once had, in one arena for all threads.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
FORWARDING = (TRAINER, CRITIC, REFERENCE, REWARD_MODEL)  # roles that run a transformers model


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
    """All roles, started side by side; then the wire from trainer to engines."""
    config = prepared.config
    groups = {role.name: _spawn(config, cluster, plan, role) for role in plan.roles}
    async with asyncio.TaskGroup() as tasks:
        await _engines_first(prepared, plan, groups[ENGINE], tasks)
        tasks.create_task(_build_sender(prepared, plan, groups[TRAINER]))
        tasks.create_task(_build_rewards(config, plan, groups))
        if REFERENCE in groups:
            tasks.create_task(_build_reference(config, plan, groups[REFERENCE]))
        if CRITIC in groups:
            tasks.create_task(_build_ranks(prepared, plan, groups[CRITIC], CriticRank))
    await _connect(config, plan, groups[TRAINER], groups[ENGINE])
    rooms = PolicyRooms(
        config, engines=groups[ENGINE], rewards=groups[REWARD], reference=groups.get(REFERENCE),
        trainer=groups[TRAINER], critic=groups.get(CRITIC),
    )
    rooms.part_tokens = part_tokens(config, plan)
    return rooms


def part_tokens(config: Config, plan: Plan) -> float:
    """Tokens of finished groups on which backward starts before the batch is whole: a micro-batch for each rank.

    inf where it waits for all. On shared processors it would only be slower, and a synchronous run waits there so that
    the same seed gives the same run to the last bit.
    """
    algorithm, streaming = algo.resolve(config.algo), config.driver.streaming
    shares = plan.device == "cpu" or plan.shares_gpus
    if streaming == "never" or algorithm.needs_whole_batch or algorithm.needs_critic:
        return math.inf
    if streaming == "auto" and shares and not config.driver.max_staleness:
        return math.inf
    return config.train.num_ranks * config.batch.max_tokens_per_micro_batch


async def sampling_rooms(prepared: Prepared, cluster: Cluster, plan: Plan) -> SamplingRooms:
    """Engines and reward workers; the engines serve the weights that they loaded."""
    config = prepared.config
    groups = {role.name: _spawn(config, cluster, plan, role) for role in plan.roles}
    async with asyncio.TaskGroup() as tasks:
        await _engines_first(prepared, plan, groups[ENGINE], tasks)
        tasks.create_task(_build_rewards(config, plan, groups))
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
    await _build_ranks(prepared, plan, trainer, TrainingRank, weights_backend=plan.weights_backend)


async def _build_ranks(prepared: Prepared, plan: Plan, ranks: RayGroup, cls: type, **more: Any) -> None:
    """A group that trains, where its checkpoint left it."""
    config, deadline_s = prepared.config, prepared.config.cluster.start_deadline_s
    address, port = await ranks.address(0, deadline_s=deadline_s)
    place = {"world_size": ranks.size, "master_address": address, "master_port": port, "device": _device(plan)}
    each = [{"config": config, "rank": rank, **place, **more} for rank in range(ranks.size)]
    await ranks.build(cls, each, deadline_s=deadline_s)
    if prepared.checkpoint is not None:
        folder = str(prepared.checkpoint / ranks.role)
        await ranks.call_all("load_checkpoint", folder, deadline_s=config.train.deadline_s)


async def _build_sender(prepared: Prepared, plan: Plan, trainer: RayGroup) -> None:
    await _build_trainer(prepared, plan, trainer)
    await trainer.call_all("prepare_wire", deadline_s=prepared.config.cluster.start_deadline_s)


async def _engines_first(prepared: Prepared, plan: Plan, engines: RayGroup, tasks: asyncio.TaskGroup) -> None:
    """Engines start beside the others; on shared GPUs before them.

    vLLM takes what leaves a GPU while it starts for its own, and lessens its KV cache by that.
    """
    building = tasks.create_task(_build_engines(prepared, plan, engines))
    if plan.shares_gpus:
        await building


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


async def _build_rewards(config: Config, plan: Plan, groups: dict[str, RayGroup]) -> None:
    """The reward workers, and the reward models that they ask: replica r of model m is actor m x replicas + r."""
    references = [reference for reference in config.reward.functions if reward_model_path(reference)]
    rewards, models, replicas = groups[REWARD], groups.get(REWARD_MODEL), config.reward.model_replicas
    deadline_s, tokenizer = config.cluster.start_deadline_s, config.model.tokenizer or config.model.path
    callers: dict[str, ModelCaller] = {}
    if models is not None:
        callers = {reward_name(reference): ModelCaller(models.actors[m * replicas : (m + 1) * replicas])
                   for m, reference in enumerate(references)}
    arguments = {"config": config, "tokenizer_path": tokenizer, "models": callers}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(rewards.build(RewardWorker, [arguments] * rewards.size, deadline_s=deadline_s))
        if models is not None:
            common = {
                "tokenizer_path": tokenizer,
                "device": _device(plan),
                "dtype": resolve_dtype(config.model.dtype, _device(plan)),
                "max_tokens_per_forward": config.reward.model_tokens_per_forward,
                "attention": config.model.attention,
                "layout": config.model.layout,
            }
            each = [{"path": reward_model_path(reference), **common} for reference in references
                    for _ in range(replicas)]
            tasks.create_task(models.build(RewardModel, each, deadline_s=deadline_s))


async def _build_reference(config: Config, plan: Plan, reference: RayGroup) -> None:
    device = _device(plan)
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
        deadline_s=2 * deadline_s,  # rank 0 waits that long for each engine, and names the one that doesn't come
    )


def _env(config: Config, plan: Plan, role: str) -> dict[str, str]:
    """Environment of a role's actors:

    one OpenMP thread on CPU, whatever the machine has, and memory that is kept; the user's own variables above all.
    """
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if plan.device == "cpu":
        threads = config.train.num_threads if role in (TRAINER, CRITIC) else 1
        env |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        env |= KEEP_MEMORY if role in FORWARDING else {}
    if role == ENGINE or (role == TRAINER and plan.weights_backend != "gloo"):  # rank 0 takes vLLM's own senders
        env = engine_env(plan.device, config.rollout) | env
    return env | config.cluster.env


def _device(plan: Plan) -> str:
    return "cuda:0" if plan.device == "cuda" else "cpu"


def _dtype_name(name: str, device: str) -> str:
    return str(resolve_dtype(name, device)).removeprefix("torch.")
