"""Actors, placement and the cluster, on Ray: the only file that imports it.

Takes:  a Plan, and plain classes to make actors of.
Gives:  `Cluster` (connect, place, spawn, close) and `RayGroup`, an ActorGroup.
Knows:  where an actor's output goes (a file of the run's logs), and how an actor's failure becomes one readable line.
Keeps:  the placement groups and actors it made, to end them.
Never:  waits without a deadline; leaves a process behind.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.cluster.group import ActorError, first_failure
from flux_ray.cluster.plan import Plan, Role, describe
from flux_ray.errors import UserError

#: Results above it live in the object store; below it Ray would send them inline through the driver.
INLINE_BYTES = 4096
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of the run's own, on CPU
MAX_CONCURRENT_CALLS = 1000  # of one actor: all groups in flight may wait in one engine
CLOSE_DEADLINE_S = 5.0  # for an actor to end its own children before it is killed


class Host:
    """The Ray actor around one plain object. Coroutines run on the loop; plain methods one after the other in one
    thread,
    so that the loop lives through a long one, and its OpenMP pool is always the same."""

    def __init__(self, log_file: str, plugins: list[str]) -> None:
        redirect_output(log_file)
        # The rooms talk to their log through logging; Ray and vLLM write to the file descriptors.
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        from flux_ray.plugins import load_plugins

        load_plugins(plugins)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._room: Any = None

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    async def build(self, cls: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._room = await loop.run_in_executor(self._thread, lambda: cls(**kwargs))

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *references: Any) -> Any:
        """`references` are arguments that Ray has resolved; `_Placed` marks where they go (see `RayGroup.submit`)."""
        args, kwargs = _fill(args, references), _fill(kwargs, references)
        function = getattr(self._room, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        close = getattr(self._room, "close", None)
        if close is not None:
            result = close()
            if inspect.isawaitable(result):
                await result


class _Placed:
    """Stands in for the n-th reference inside nested arguments: Ray resolves references only at the top level."""

    def __init__(self, index: int) -> None:
        self.index = index


def _take(value: Any, references: list[Any]) -> Any:
    if isinstance(value, ray.ObjectRef):
        references.append(value)
        return _Placed(len(references) - 1)
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, references) for item in value)
    if isinstance(value, dict):
        return {key: _take(item, references) for key, item in value.items()}
    return value


def _fill(value: Any, references: tuple[Any, ...]) -> Any:
    if isinstance(value, _Placed):
        return references[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, references) for item in value)
    if isinstance(value, dict):
        return {key: _fill(item, references) for key, item in value.items()}
    return value


def redirect_output(file: str | Path) -> None:
    """Send this process's output, and its children's, to a file (made with its folder)."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(str(file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Ray replaced the streams by its own: what Python prints must go the same way.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


class RayGroup:
    """An ActorGroup of Host actors."""

    def __init__(self, role: str, actors: list[Any], log_files: list[Path]) -> None:
        self.role = role
        self.actors = actors
        self._log_files = log_files

    @property
    def size(self) -> int:
        return len(self.actors)

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        references: list[Any] = []
        call = self.actors[index].call.options(num_returns=num_returns)
        return call.remote(method, _take(args, references), _take(kwargs, references), *references)

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        name = f"{self.role} {index}"
        try:
            return await asyncio.wait_for(reference, deadline_s)
        except TimeoutError:
            raise TimeoutError(
                f"{name} did not finish {what} within {deadline_s:g} s; its log: {self._log_files[index]}"
            ) from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, UserError):
                raise cause from None
            raise ActorError(f"{name}, {what}: {type(cause).__name__}: {cause}", role=self.role, index=index) from cause
        except ray.exceptions.RayActorError as error:
            raise ActorError(
                f"{name} died during {what} ({_why_died(error)}); its log: {self._log_files[index]}",
                role=self.role,
                index=index,
            ) from error

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return await self.result(
            self.submit(index, method, *args, **kwargs), index=index, what=method, deadline_s=deadline_s
        )

    async def call_all(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> list[Any]:
        calls = [self.call(i, method, *args, deadline_s=deadline_s, **kwargs) for i in range(self.size)]
        return await first_failure(calls)

    async def build(self, cls: Callable[..., Any], each: list[dict[str, Any]], *, deadline_s: float) -> None:
        """Make the plain object inside every actor, with its own arguments."""
        references = [actor.build.remote(cls, kwargs) for actor, kwargs in zip(self.actors, each, strict=True)]
        await first_failure(
            [
                self.result(reference, index=i, what="start", deadline_s=deadline_s)
                for i, reference in enumerate(references)
            ]
        )

    async def address(self, index: int, *, deadline_s: float) -> tuple[str, int]:
        return await self.result(
            self.actors[index].address.remote(), index=index, what="address", deadline_s=deadline_s
        )

    async def close(self, *, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        closing = [asyncio.ensure_future(_wait_quietly(actor.close.remote(), deadline_s)) for actor in self.actors]
        await asyncio.gather(*closing, return_exceptions=True)
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)


async def _wait_quietly(reference: Any, deadline_s: float) -> None:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(reference, deadline_s)


def _why_died(error: Exception) -> str:
    text = str(error)
    for line in text.splitlines():
        if "cause" in line.lower() or "exit" in line.lower() or "kill" in line.lower():
            return line.strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__


class EngineCaller:
    """Calls engines from inside another actor (the sender of weights), each with its own payload, under a deadline."""

    def __init__(self, actors: list[Any], deadline_s: float) -> None:
        self._actors = actors
        self._deadline_s = deadline_s

    def __call__(self, method: str, payloads: list[tuple[Any, ...]]) -> list[Any]:
        references = [
            actor.call.remote(method, payload, {}) for actor, payload in zip(self._actors, payloads, strict=True)
        ]
        try:
            return ray.get(references, timeout=self._deadline_s)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(
                f"not every engine finished {method} within weights.deadline_s={self._deadline_s:g} s"
            ) from None


class Cluster:
    """A connection to Ray: a running cluster, or one of the run's own that ends with it."""

    def __init__(self, *, log_dir: Path, plugins: list[str]) -> None:
        self._log_dir = log_dir
        self._plugins = plugins
        self._groups: list[RayGroup] = []
        self._placements: dict[str, list[PlacementGroup]] = {}
        self._owned = False

    @staticmethod
    def wanted_address(address: str | None) -> str | None:
        """The cluster to join: the config's, else RAY_ADDRESS (set inside a Ray job), else none: start one."""
        return address or os.environ.get("RAY_ADDRESS") or None

    def connect(
        self, address: str | None, *, cpus: float, object_store_bytes: int | None = LOCAL_OBJECT_STORE_BYTES
    ) -> None:
        """Join the cluster at `address`, or start one with that many CPUs declared."""
        address = self.wanted_address(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if address:
                ray.init(address=address, **options)
            else:
                self._owned = not ray.is_initialized()
                ray.init(
                    num_cpus=max(1, round(cpus + 0.5)),
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
                    _system_config={"max_direct_call_object_size": INLINE_BYTES},
                    **options,
                )
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at cluster.address={address}: {str(error).splitlines()[0]}"
            ) from None

    @staticmethod
    def num_gpus() -> int:
        return int(ray.cluster_resources().get("GPU", 0))

    async def place(self, plan: Plan, *, deadline_s: float) -> None:
        """Reserve every bundle of the plan, all within the deadline.

        UserError names what can't be placed, and what there is.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        for role, groups in plan.bundles().items():
            self._placements[role] = [placement_group(bundles, strategy="PACK") for bundles in groups]
        for role, groups in plan.bundles().items():
            for placed, bundles in zip(self._placements[role], groups, strict=True):
                ready = await loop.run_in_executor(None, placed.wait, max(0.1, end - loop.time()))
                if not ready:
                    have, free = ray.cluster_resources(), ray.available_resources()
                    raise UserError(
                        f"{role}: no place for a group of {len(bundles)} x ({describe(bundles[0])}) within "
                        f"{deadline_s:g} s; the run asks for {describe(plan.total)}, the cluster has "
                        f"{describe(have)}, of which {describe(free)} free"
                    )

    def spawn(self, role: Role, *, env: dict[str, str]) -> RayGroup:
        """Start the role's actors in their places. Their objects come with `RayGroup.build`."""
        placements = self._placements[role.inside or role.name]
        log_files = [self._log_dir / f"{role.name}-{i}.log" for i in range(role.count)]
        actors = []
        for i, log_file in enumerate(log_files):
            each = role.own_group_each or role.inside is not None
            place = PlacementGroupSchedulingStrategy(
                placements[i] if each else placements[0],
                placement_group_bundle_index=0 if each else i,
                placement_group_capture_child_tasks=False,
            )
            options = {
                "num_cpus": role.cpus,
                "num_gpus": role.gpus,
                "scheduling_strategy": place,
                "max_concurrency": MAX_CONCURRENT_CALLS,
                "runtime_env": {"env_vars": env},
                "max_restarts": 0,
            }
            actors.append(ray.remote(Host).options(**options).remote(str(log_file), self._plugins))
        group = RayGroup(role.name, actors, log_files)
        self._groups.append(group)
        return group

    async def close(self) -> None:
        """End the actors, give the places back, leave the cluster (and end it if it is the run's own). Never raises."""
        await asyncio.gather(*(group.close() for group in self._groups), return_exceptions=True)
        for placed in (placed for groups in self._placements.values() for placed in groups):
            with contextlib.suppress(Exception):
                remove_placement_group(placed)
        if self._owned:
            ray.shutdown()
