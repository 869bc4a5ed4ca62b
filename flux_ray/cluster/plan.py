"""Plans which actors are placed where: pure code.

Takes:  Config, and the number of GPUs of the cluster.
Gives:  a Plan: device, weights backend, and a Role (count, CPUs, GPUs of an actor) for every kind of actor.
Knows:  three shapes: CPU only; GPUs of their own for each actor; GPUs shared by engine, trainer and the others.
Never:  asks Ray anything; a config that no cluster could place is refused here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flux_ray.config import (
    Config,
    PolicyGradientConfig,
    PPOConfig,
    ReferencedConfig,
    RewardConfig,
    RolloutConfig,
)
from flux_ray.errors import UserError
from flux_ray.names import reward_model_path

ENGINE, ROLLOUT, REWARD, REFERENCE = "engine", "rollout", "reward", "reference"
TRAINER, CRITIC, REWARD_MODEL = "trainer", "critic", "reward_model"
ENGINES_PER_WORKER = 8  # for each rollout worker, unless rollout.num_workers says otherwise
#: Shares of one GPU where actors share it. Where their sum would pass 1, all are lessened alike. Ray counts them;
#: vLLM's gpu_memory_utilization bounds memory.
SHARED_GPU = {ENGINE: 0.4, TRAINER: 0.4, CRITIC: 0.4, REFERENCE: 0.2, REWARD_MODEL: 0.2}
STAGING = {"gloo": "host", "nccl": "device"}  # weights.staging that each backend offers beside auto and none
GPU_DIGITS = 10_000  # Ray counts shares of a GPU in ten-thousandths


@dataclass(frozen=True)
class Role:
    """The actors of one kind. With `inside`, actor i lives in the placement group of that role's actor hosts[i].

    >>> Role("engine", count=2, cpus=1.0, gpus=0.0).bundle
    {'CPU': 1.0}
    """

    name: str
    count: int
    cpus: float
    gpus: float
    own_group_each: bool = False  # a placement group per actor: it can join and leave alone
    inside: str | None = None
    hosts: tuple[int, ...] = ()

    @property
    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.cpus}
        if self.gpus:
            bundle["GPU"] = self.gpus
        return bundle


@dataclass(frozen=True)
class Plan:
    device: str  # cpu or cuda
    weights_backend: str | None  # gloo, nccl or ipc; None where there is no engine
    roles: tuple[Role, ...]

    def role(self, name: str) -> Role | None:
        return next((role for role in self.roles if role.name == name), None)

    @property
    def shares_gpus(self) -> bool:
        return any(role.inside and role.gpus for role in self.roles)

    def bundles(self) -> dict[str, list[list[dict[str, float]]]]:
        """Placement groups by role, each a list of bundles; a role that lives inside another's has none of its own."""
        groups: dict[str, list[list[dict[str, float]]]] = {}
        for role in self.roles:
            if role.inside:
                continue
            bundles = [dict(role.bundle) for _ in range(role.count)]
            for guest in self.roles:
                for host in guest.hosts if guest.inside == role.name else ():
                    bundles[host]["CPU"] += guest.cpus
            for bundle in bundles:
                if bundle.get("GPU", 0) % 1:
                    bundle["GPU"] = 1.0  # a shared GPU is reserved whole and divided among its actors
            groups[role.name] = [[bundle] for bundle in bundles] if role.own_group_each else [bundles]
        return groups

    @property
    def total(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for groups in self.bundles().values():
            for bundle in (bundle for group in groups for bundle in group):
                for resource, amount in bundle.items():
                    total[resource] = total.get(resource, 0.0) + amount
        return total


def make_plan(
    config: Config, *, cluster_gpus: int, needs_reference: bool, trains: bool = True,
) -> Plan:
    """The plan for a cluster with that many GPUs.

    It has reference actors where the frozen policy is needed, a critic as large as the training group for ppo, and
    actors for each reward model that reward.functions names. Where nothing is trained (an evaluation) it has engines,
    rollout and reward workers alone; without rollouts (sft, pairs, given groups) training ranks and reference, which
    evaluate as well. UserError for a config that no cluster could place.
    """
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if cluster_gpus else "cpu"
    if device == "cuda" and not cluster_gpus:
        raise UserError("cluster.device=cuda, but the cluster has no GPU")
    rollouts = isinstance(config, PolicyGradientConfig)
    counts = _training(config, needs_reference) if trains or not rollouts else {}
    gpus_each = dict.fromkeys(SHARED_GPU, 1)
    if isinstance(config, PolicyGradientConfig):
        counts |= _sampling(config.rollout, config.reward)
        gpus_each[ENGINE] = config.rollout.tensor_parallel_size
    host = ENGINE if rollouts else TRAINER  # whose placement groups the others live in where GPUs are shared
    wanted = sum(counts.get(name, 0) * gpus for name, gpus in gpus_each.items()) if device == "cuda" else 0
    guests = [name for name in SHARED_GPU if name in counts and name != host]
    shared = device == "cuda" and bool(guests) and (config.cluster.colocate or cluster_gpus == 1 < wanted)
    if shared:
        _check_shared(config, counts, host)
    roles = []
    shares = _shares(counts, host)
    for name in (ENGINE, TRAINER, CRITIC, REFERENCE, REWARD_MODEL, REWARD, ROLLOUT):
        if name not in counts:
            continue
        gpus = 0.0 if device == "cpu" or name in (REWARD, ROLLOUT) else float(gpus_each[name])
        cpus = config.cluster.cpus_per_actor
        if shared and gpus:
            gpus = shares[name]
        inside: str | None = None
        hosts: tuple[int, ...] = ()
        if name == ROLLOUT:
            inside, hosts = ENGINE, _hosts_of_workers(counts[ROLLOUT], counts[ENGINE])
        elif shared and name in guests:
            inside, hosts = host, tuple(i % counts[host] for i in range(counts[name]))
        own_group_each = name == (host if shared else ENGINE)
        roles.append(Role(name, counts[name], cpus, gpus, own_group_each, inside, hosts))
    return Plan(device, _weights_backend(config, device, shared), tuple(roles))


def _training(config: Config, needs_reference: bool) -> dict[str, int]:
    """Actors that train, and the frozen policy's."""
    counts = {TRAINER: config.train.num_ranks}
    if needs_reference and isinstance(config, ReferencedConfig):
        counts[REFERENCE] = config.reference.num_actors
    if isinstance(config, PPOConfig):
        counts[CRITIC] = config.train.num_ranks
    return counts


def _sampling(rollout: RolloutConfig, reward: RewardConfig) -> dict[str, int]:
    """Actors that sample and score."""
    counts = {ENGINE: rollout.num_engines, REWARD: reward.num_workers,
              ROLLOUT: rollout.num_workers or math.ceil(rollout.num_engines / ENGINES_PER_WORKER)}
    num_models = len(list(filter(reward_model_path, reward.functions)))
    return counts | ({REWARD_MODEL: num_models * reward.model_replicas} if num_models else {})


def _hosts_of_workers(num_workers: int, num_engines: int) -> tuple[int, ...]:
    """Worker i lives beside engine 8i; a worker beyond the last such engine, beside any engine."""
    return tuple(ENGINES_PER_WORKER * i if ENGINES_PER_WORKER * i < num_engines else i % num_engines
                 for i in range(num_workers))


def _shares(counts: dict[str, int], host: str) -> dict[str, float]:
    """The share of a GPU of one actor of each role. On each GPU are one actor of the host's role and its guests."""
    on_one = {name: math.ceil(counts[name] / counts[host]) for name in SHARED_GPU if name in counts}
    whole = max(1.0, sum(SHARED_GPU[name] * number for name, number in on_one.items()))
    return {name: math.floor(SHARED_GPU[name] / whole * GPU_DIGITS + 1e-6) / GPU_DIGITS for name in on_one}


def _check_shared(config: Config, counts: dict[str, int], host: str) -> None:
    if counts.get(REFERENCE, 0) > counts[host] and host == TRAINER:
        raise UserError(f"where GPUs are shared, reference.num_actors must not exceed train.num_ranks, got "
                        f"{counts[REFERENCE]} reference actors, {counts[TRAINER]} ranks")
    if not isinstance(config, PolicyGradientConfig):
        return
    if config.rollout.tensor_parallel_size != 1:
        raise UserError(
            "engines that share GPUs with the trainer must have rollout.tensor_parallel_size=1, "
            f"got {config.rollout.tensor_parallel_size}"
        )
    if counts.get(TRAINER, counts[ENGINE]) != counts[ENGINE] or counts.get(REFERENCE, 0) > counts[ENGINE]:
        raise UserError(
            "where GPUs are shared, train.num_ranks must equal rollout.num_engines and reference.num_actors must "
            f"not exceed it, got {counts[TRAINER]} ranks, {counts[ENGINE]} engines, "
            f"{counts.get(REFERENCE, 0)} reference actors"
        )


def _weights_backend(config: Config, device: str, shared: bool) -> str | None:
    """The backend that weights travel by; None where there is no engine."""
    if not isinstance(config, PolicyGradientConfig):
        return None
    right = "gloo" if device == "cpu" else "ipc" if shared else "nccl"
    chosen = config.weights.backend
    if chosen not in ("auto", right) and not (device == "cuda" and chosen == "gloo"):
        where = "on CPU" if device == "cpu" else "where trainer and engine share a GPU" if shared else "between GPUs"
        raise UserError(f"weights.backend={chosen} can't work {where}: use {right} (or auto)")
    backend = right if chosen == "auto" else chosen
    staging, possible = config.weights.staging, STAGING.get(backend)
    if staging not in ("auto", "none", possible):
        offered = f"auto, none or {possible}" if possible else "auto or none"
        raise UserError(f"weights.staging={staging}: {backend} offers {offered}")
    return backend


def describe(resources: dict[str, float]) -> str:
    """`4 CPU, 1 GPU`: only the resources that placement looks at.

    >>> describe({"CPU": 4.0, "memory": 1e9})
    '4 CPU'
    """
    parts = [f"{math.floor(resources[name] * 100) / 100:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(parts) or "nothing"
