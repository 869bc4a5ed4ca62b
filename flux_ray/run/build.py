"""Makes live actors from a prepared config, and the loop that runs on them.

Takes:  Prepared, a Cluster that is connected and has placed the plan, the supervisor.
Gives:  a Loop, an Evaluation or an OfflineLoop on actors that are loaded and connected; the cluster ends them.
Knows:  which class runs in which role, its arguments, and what its death means. Whatever can start at once does.
        Actors of a life that is over are taken over as they stand.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flux_ray import algo
from flux_ray.cluster.group import Actor, ActorError, Group, all_within
from flux_ray.cluster.groups import Cluster, RayGroup
from flux_ray.cluster.plan import CRITIC, ENGINE, REFERENCE, REWARD, REWARD_MODEL, ROLLOUT, TRAINER, Plan, Role
from flux_ray.cluster.supervisor import OnDeath, Supervisor
from flux_ray.config import (
    Config,
    PolicyGradientConfig,
    PolicyModelConfig,
    PPOConfig,
    ReferenceConfig,
    ReferencedConfig,
    SampledConfig,
    changed,
)
from flux_ray.data import PromptSource
from flux_ray.driver.agreement import Agreement
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.engines import Connect, Engines
from flux_ray.driver.evaluation import Evaluation
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.loop import Loop
from flux_ray.driver.ranks import Ranks
from flux_ray.driver.stages import Stages
from flux_ray.driver.staleness import Bound
from flux_ray.driver.versions import Versions
from flux_ray.errors import UserError
from flux_ray.model import context_length, load_tokenizer, resolve_dtype, turns
from flux_ray.model.stops import stop_token_ids
from flux_ray.names import reward_model_path
from flux_ray.observability.rollouts import KeptRollouts
from flux_ray.offline.data import OfflineData
from flux_ray.offline.loop import OfflineLoop, make_learner
from flux_ray.offline.stages import OfflineStages
from flux_ray.protocols import Engine, Trains
from flux_ray.protocols import RolloutWorker as Worker
from flux_ray.protocols import TrainingRank as Rank
from flux_ray.reward import RewardWorker, Surroundings
from flux_ray.reward.model import RewardModel
from flux_ray.rollout.check import check_kv_cache
from flux_ray.rollout.engine import RolloutEngine, engine_env
from flux_ray.rollout.functions import packed_rollout
from flux_ray.rollout.known_models import check_served
from flux_ray.rollout.worker import RolloutWorker
from flux_ray.run.actors import CriticRank, ReferencePolicy, TrainingRank
from flux_ray.run.prepare import Prepared, Rollouts, Task
from flux_ray.run.recorder import Recorder

#: On CPU glibc gives each large tensor's memory back and takes it again, with a page fault for every 4 KiB: a tenth of
#: a training step. These make it keep the memory, in one arena for all threads.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
FORWARDING = (TRAINER, CRITIC, REFERENCE, REWARD_MODEL)  # roles that run a transformers model
INFORMED = (ENGINE, ROLLOUT, REWARD, TRAINER, CRITIC)  # roles that are told who is alive
LET_GO_S = 30.0  # for a rollout worker to stop all that it does



def check_engines(prepared: Prepared, plan: Plan) -> None:
    """UserError for a model or context that the plan's engines can't serve, before an actor starts."""
    config, task = prepared.config, prepared.task
    if not isinstance(config, PolicyGradientConfig) or not isinstance(task, Rollouts):
        return
    path = str(config.model.path)
    check_served(path, plan.device, allow_gap=config.weights.allow_logprob_gap)
    if plan.device != "cpu":
        return
    dtype_bytes = resolve_dtype(config.model.dtype, plan.device).itemsize
    context = _context(config, task) or context_length(path)
    check_kv_cache(path, context=context, dtype_bytes=dtype_bytes, kv_cache_gib=config.rollout.kv_cache_gib)


class Build:
    """The actors of one run."""

    def __init__(self, prepared: Prepared, cluster: Cluster, plan: Plan, supervisor: Supervisor) -> None:
        self._prepared, self._plan, self.supervisor = prepared, plan, supervisor
        self._config, self._cluster = prepared.config, cluster
        self._takes_over, cluster.stands = cluster.stands, False
        self.starting = [role for role in plan.roles if cluster.standing(role.name) is None]
        self._groups = {role.name: self._standing(role) for role in plan.roles}

    @property
    def _start_engine(self) -> Callable[[Engine], Awaitable[None]]:
        return Engine.start if self._plan.role(TRAINER) is None else Engine.start_for_training

    def _standing(self, role: Role) -> RayGroup[Any]:
        group = self._cluster.standing(role.name)
        if group is None:
            env = _env(self._config, self._plan, role.name)
            group = self._cluster.spawn(role, env=env, plugins=role.name != ROLLOUT)
        self.supervisor.add(group, on_death(self._config)[role.name], informed=role.name in INFORMED,
                            start=self._start_engine if role.name == ENGINE else None)
        return group

    async def loop(self, task: Task, recorder: Recorder) -> Loop | OfflineLoop:
        """The loop that goes with the data, on actors that are loaded and connected."""
        if isinstance(task, Rollouts):
            return await self._rollout_loop(task, recorder)
        return await self._offline_loop(task, recorder)

    async def evaluation(self, task: Task, recorder: Recorder) -> Evaluation | OfflineLoop:
        """An evaluation alone: nothing is trained."""
        if isinstance(task, OfflineData):
            return await self._offline_loop(task, recorder)
        if task.evaluation is None:
            raise UserError("eval.data is missing: the prompts to evaluate on")
        async with asyncio.TaskGroup() as tasks:
            await self._begin_sampling(task, tasks)
        await self.supervisor.begin()
        return self._evaluation(task.evaluation, self._stages(recorder))

    async def lay_down(self) -> None:
        """The life is over, and its ranks end. The other actors let go of all that it has asked of them; then they
        stand in the cluster for the next one, unless one of them fails."""
        for role in (TRAINER, CRITIC):
            self._cluster.end_role(role)
        try:
            await all_within([worker.call(Worker.let_go) for worker in self._groups.get(ROLLOUT, ())], LET_GO_S)
        except (ActorError, TimeoutError) as error:
            logging.getLogger(__name__).warning("all actors are started anew: %s", error)
        else:
            self._cluster.stands, self._cluster.epoch = True, self.supervisor.members.epoch

    async def _rollout_loop(self, task: Rollouts, recorder: Recorder) -> Loop:
        """All roles, started side by side; then the weight channel from trainer to engines."""
        config, groups, start = self._sampling, self._groups, self._prepared.start
        async with asyncio.TaskGroup() as tasks:
            if not self._takes_over:
                await self._begin_sampling(task, tasks)
            tasks.create_task(self._build_sender())
            if REFERENCE in groups and not self._takes_over:
                tasks.create_task(self._build_reference())
            if CRITIC in groups:
                tasks.create_task(self._build_ranks(CRITIC, CriticRank, config=critic_config(config)))
        await self.supervisor.begin()
        stages = self._stages(recorder, connect=self._connect)
        if self._takes_over:  # in the middle of an update, maybe
            await stages.engines.abandon_update(config.weights.deadline_s)
        loop = Loop(config, stages=stages, prompts=task.train,
                    ranks=Ranks(config, trainer=groups[TRAINER], critic=groups.get(CRITIC), engines=stages.engines),
                    versions=Versions(max_staleness=config.driver.max_staleness, highest=start.version,
                                      steps_of=start.steps_of),
                    agreement=self._agreement(task))
        loop.part_tokens = part_tokens(config, self._plan)
        if self._prepared.checkpoint is not None and start.kept:
            loop.keeping.kept = start.kept, self._prepared.checkpoint / ROLLOUT
        if config.observability.rollouts_max_gib:
            loop.keeping.rollouts = KeptRollouts(recorder.folder.path, config.observability.rollouts_max_gib)
        if task.evaluation is not None:
            loop.evaluation = self._evaluation(task.evaluation, stages)
        return loop

    def _evaluation(self, prompts: PromptSource, stages: Stages) -> Evaluation:
        return Evaluation(self._sampling, prompts, stages)

    def _agreement(self, task: Rollouts) -> Agreement:
        config = self._sampling
        path = str(config.model.path)
        return Agreement(config.rollout, model=path, dtype=_dtype_name(config.model.dtype, self._plan.device),
                         context=_context(config, task) or context_length(path), turns=turns(path))

    def _stages(self, recorder: Recorder, *, connect: Connect | None = None) -> Stages:
        config, start = self._sampling, self._prepared.start
        bound = Bound(config.batch.prompts_per_step, config.driver.max_staleness, config.filter.oversample,
                      in_order=config.driver.deterministic)
        num_parts = min(config.rollout.split_groups, config.rollout.group_size)
        ledger = Ledger(bound, DropStats(config, total=start.prompts_dropped), num_parts=num_parts,
                        num_steps=config.driver.num_steps, next_uid=start.next_uid, unfinished=start.unfinished)
        engines = Engines(self._groups[ENGINE], self.supervisor, connect)
        stages = Stages(config, ledger, workers=self._groups[ROLLOUT], engines=engines, warn=recorder.warn_of,
                        step=start.step)
        stages.log_dir = recorder.folder.logs
        return stages

    async def _offline_loop(self, task: OfflineData, recorder: Recorder) -> OfflineLoop:
        """The training ranks, and reference actors where they are asked for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._build_trainer())
            if REFERENCE in self._groups and not self._takes_over:
                tasks.create_task(self._build_reference())
        await self.supervisor.begin()
        config = self._config
        settings = config.reference if isinstance(config, ReferencedConfig) else ReferenceConfig()
        stages = OfflineStages(config.train, settings, trainer=self._groups[TRAINER],
                               reference=self._groups.get(REFERENCE))
        learner = make_learner(config, data=task, stages=stages, folder=recorder.folder)
        return OfflineLoop(learner, size=config.batch.prompts_per_step, start=self._prepared.start)

    @property
    def _sampling(self) -> PolicyGradientConfig:
        """The config of a run that rolls out."""
        assert isinstance(self._config, PolicyGradientConfig), self._config.algo.name
        return self._config

    @property
    def trained(self) -> list[Group[Trains]]:
        """The groups that train a model, the policy's first."""
        return [self._groups[role] for role in (TRAINER, CRITIC) if role in self._groups]

    async def _begin_sampling(self, task: Rollouts, tasks: asyncio.TaskGroup) -> None:
        """Engines start beside the other actors; on shared GPUs before them.

        vLLM takes what leaves a GPU while it starts for its own, and lessens its KV cache by that.
        """
        building = tasks.create_task(self._build_engines(task))
        if self._plan.shares_gpus:
            await building
        tasks.create_task(self._build_workers(task))
        tasks.create_task(self._build_rewards())

    async def _build_engines(self, task: Rollouts) -> None:
        config, role, engines = self._sampling, self._plan.role(ENGINE), self._groups[ENGINE]
        assert role is not None
        arguments: dict[str, object] = {
            "config": changed(config, {"rollout.max_model_len": _context(config, task)}),
            "device": self._plan.device,
            "dtype": _dtype_name(config.model.dtype, self._plan.device),
            "weights_backend": self._plan.weights_backend,
            "gpu_share": role.gpus if role.gpus else 1.0,
        }
        each = [{**arguments, "index": index} for index in range(len(engines))]
        await engines.build(RolloutEngine, each, deadline_s=config.cluster.start_deadline_s)
        await all_within([engine.call(self._start_engine) for engine in engines], config.cluster.start_deadline_s)

    async def _build_workers(self, task: Rollouts) -> None:
        config, workers = self._sampling, self._groups[ROLLOUT]
        batches = config.driver.max_staleness + 1 + config.filter.oversample
        most_groups = math.ceil(batches * config.batch.prompts_per_step)
        most_groups += task.evaluation.num_rows if task.evaluation is not None else 0
        path = config.model.tokenizer or config.model.path
        tokenizer = load_tokenizer(str(path))
        told = {"config": config, "tokenizer_path": path, "most_groups": most_groups,
                "end_ids": stop_token_ids(config.model.path, tokenizer),
                # A worker that loads it itself imports torch for it: 8 s of CPU and 300 MB. Slow ones may not travel.
                "tokenizer": tokenizer if getattr(tokenizer, "is_fast", False) else None,
                "function": packed_rollout(config.rollout.function)}
        each = [{**told, "index": index} for index in range(len(workers))]
        await workers.build(RolloutWorker, each, deadline_s=config.cluster.start_deadline_s)

    async def _build_rewards(self) -> None:
        """The reward workers, and the reward models that they ask: replica r of model m is actor m x replicas + r."""
        config, rewards, device = self._sampling, self._groups[REWARD], _device(self._plan)
        deadline_s = config.cluster.start_deadline_s
        async with asyncio.TaskGroup() as tasks:
            each = {"config": config, "surroundings": Surroundings.here(config.reward)}
            tasks.create_task(rewards.build(RewardWorker, [each] * len(rewards), deadline_s=deadline_s))
            if REWARD_MODEL in self._groups:
                common = {
                    "tokenizer_path": config.model.tokenizer or config.model.path,
                    "device": device,
                    "dtype": resolve_dtype(config.model.dtype, device),
                    "max_tokens_per_forward": config.reward.model_tokens_per_forward,
                    "attention": config.model.attention,
                    "layout": config.model.layout,
                }
                paths = filter(None, map(reward_model_path, config.reward.functions))
                models = [{"path": path, **common} for path in paths for _ in range(config.reward.model_replicas)]
                tasks.create_task(self._groups[REWARD_MODEL].build(RewardModel, models, deadline_s=deadline_s))

    async def _build_reference(self) -> None:
        config, device, reference = self._config, _device(self._plan), self._groups[REFERENCE]
        assert isinstance(config, ReferencedConfig) and isinstance(config.model, PolicyModelConfig)
        dtype = config.model.dtype if config.reference.dtype == "auto" else config.reference.dtype
        arguments: dict[str, object] = {
            "path": config.reference.path or config.model.path,
            "dtype": resolve_dtype(dtype, device),
            "device": device,
            # Pairs were not sampled here: their log-probs are the model's own.
            "temperature": config.rollout.temperature if isinstance(config.rollout, SampledConfig) else 1.0,
            "max_tokens_per_forward": config.reference.max_tokens_per_forward,
            "attention": config.model.attention,
            "layout": config.model.layout,
            "chunk_tokens": config.model.logprob_chunk_tokens,
        }
        await reference.build(ReferencePolicy, [arguments] * len(reference),
                              deadline_s=config.cluster.start_deadline_s)

    async def _build_trainer(self) -> None:
        await self._build_ranks(TRAINER, TrainingRank, weights_backend=self._plan.weights_backend)

    async def _build_ranks(self, role: str, cls: type, **more: object) -> None:
        """Build a group that trains, and load its checkpoint if there is one."""
        ranks, config, deadline_s = self._groups[role], self._config, self._config.cluster.start_deadline_s
        address, port = await ranks.address(0, deadline_s=deadline_s)
        place = {"world_size": len(ranks), "master_address": address, "master_port": port,
                 "device": _device(self._plan)}
        each = [{"config": config, "rank": rank, **place} | more for rank in range(len(ranks))]
        await ranks.build(cls, each, deadline_s=deadline_s)
        if self._prepared.checkpoint is not None:
            folder = str(self._prepared.checkpoint / role)
            await all_within([rank.call(Rank.load_checkpoint, folder) for rank in ranks], config.train.deadline_s)

    async def _build_sender(self) -> None:
        await self._build_trainer()
        await all_within([rank.call(Rank.prepare_channel) for rank in self._groups[TRAINER]],
                         self._config.cluster.start_deadline_s)

    async def _connect(self, engines: Sequence[Actor[Engine]]) -> None:
        """Open the weight channel: rank 0 meets every engine worker; the other ranks only learn that they needn't."""
        trainer, deadline_s = self._groups[TRAINER], self._sampling.weights.deadline_s
        address, port = await trainer.address(0, deadline_s=deadline_s)
        send_dtype = _dtype_name(self._config.model.dtype, self._plan.device)
        # Rank 0 waits its own deadline for each engine, and names the one that doesn't answer.
        await all_within([rank.call(Rank.connect, list(engines), address=address, port=port, send_dtype=send_dtype)
                          for rank in trainer], 2 * deadline_s)


def on_death(config: Config) -> dict[str, OnDeath]:
    """What the death of an actor of each role does."""
    drops = isinstance(config, PolicyGradientConfig) and config.reward.on_failure == "drop"
    reward = OnDeath.REPLACE if drops else OnDeath.END_RUN
    goes_on = isinstance(config, PolicyGradientConfig) and config.cluster.max_restarts > 0
    policies = dict.fromkeys((TRAINER, CRITIC, REWARD_MODEL), OnDeath.END_RUN)
    policies |= dict.fromkeys((ENGINE, REFERENCE), OnDeath.REPLACE if goes_on else OnDeath.END_RUN)
    return policies | {ROLLOUT: OnDeath.REPLACE, REWARD: reward}


def _context(config: PolicyGradientConfig, task: Rollouts) -> int | None:
    """The engines' context. An engine holds the KV of its whole context, and a model's own context may be huge.

    None (the model's own) for a user's rollout function, which may see more tokens than it samples.
    """
    rollout = config.rollout
    if rollout.max_model_len or rollout.function != "single_turn":
        return rollout.max_model_len
    return min(task.longest_prompt + rollout.max_tokens, context_length(str(config.model.path)))


def part_tokens(config: PolicyGradientConfig, plan: Plan) -> float:
    """Backward starts on so many tokens of finished groups, before the batch is whole: a micro-batch for each rank.

    inf where it waits for the whole batch. On shared processors an early start would be slower, and a synchronous run
    waits there so that the same seed gives the same run to the last bit.
    """
    algorithm, streaming = algo.resolve(config.algo), config.driver.streaming
    shares = plan.device == "cpu" or plan.shares_gpus
    if streaming == "never" or config.driver.deterministic or algorithm.needs_whole_batch or algorithm.needs_critic:
        return math.inf
    if streaming == "auto" and shares and not config.driver.max_staleness:
        return math.inf
    return config.train.num_ranks * config.batch.max_tokens_per_micro_batch


def critic_config(config: Config) -> Config:
    """The config of ppo's critic: the policy's, with the critic's own model and learning rate."""
    assert isinstance(config, PPOConfig), config.algo.name
    return changed(config, {
        "model.path": config.critic.path or config.model.path,
        "model.tokenizer": config.model.tokenizer or config.model.path,  # to save with the critic
        "train.learning_rate": config.critic.learning_rate,
    })


def _env(config: Config, plan: Plan, role: str) -> dict[str, str]:
    """Environment of a role's actors. On CPU: few OpenMP threads, and memory that is kept. The user's own come last."""
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
    if plan.device == "cpu":
        threads = config.train.num_threads if role in (TRAINER, CRITIC) else 1
        env |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        env |= KEEP_MEMORY if role in FORWARDING else {}
    # Rank 0 sends with vLLM's own code.
    near_vllm = role == ENGINE or (role == TRAINER and plan.weights_backend != "gloo")
    if near_vllm and isinstance(config, PolicyGradientConfig):
        env = engine_env(plan.device, config.rollout) | env
    return env | config.cluster.env


def _device(plan: Plan) -> str:
    return "cuda:0" if plan.device == "cuda" else "cpu"


def _dtype_name(name: str, device: str) -> str:
    return str(resolve_dtype(name, device)).removeprefix("torch.")
