"""Actors, placement and the cluster, on Ray.

Takes:  a Plan, and plain classes to make actors of.
Gives:  `Cluster` (connect, place, spawn, close) and `RayGroup`, an ActorGroup.
Knows:  how an actor's failure becomes one readable line, and who died first.
Keeps:  the placement groups and actors it made, to end them.
Never:  waits without a deadline; leaves a process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.cluster.group import ActorDied, ActorError, first_failure
from flux_ray.cluster.host import Host
from flux_ray.cluster.mail import CallFailed, Mailbox, Reference
from flux_ray.cluster.plan import Plan, Role, describe
from flux_ray.errors import UserError

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of the run's own, on CPU
MAX_CONCURRENT_CALLS = 100_000  # of one actor: never reached, or a call that frees others would queue behind them
CLOSE_DEADLINE_S = 5.0  # for an actor to end its own children before it is killed


class RayGroup:
    """An ActorGroup of Host actors; `make(i)` starts the one at index i."""

    def __init__(self, role: str, make: Callable[[int], Any], log_files: list[Path]) -> None:
        self.role = role
        self._make = make
        self._log_files = log_files
        self._rooms: list[tuple[Callable[..., Any], dict[str, Any]]] = []
        self._replacing = asyncio.Lock()
        self._mail = [self._made(index) for index in range(len(log_files))]

    def _made(self, index: int) -> Mailbox:
        return Mailbox(self._make(index), f"{self.role} {index}")

    @property
    def actors(self) -> list[Any]:
        return [mail.actor for mail in self._mail]

    @property
    def size(self) -> int:
        return len(self._mail)

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        mail = self._mail[index]
        reference = mail.submit(method, args, kwargs, keeps=num_returns == 2)
        return reference if num_returns == 1 else (mail.held(reference), reference)

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        name = f"{self.role} {index}"
        try:
            async with asyncio.timeout(deadline_s) as limit:  # wait_for forgets that it was cancelled (Python 3.11)
                return await reference
        except CallFailed as error:
            if error.by_user:
                raise UserError(error.text) from None
            if error.actor is not None:
                role, culprit = error.actor
                log_file = self._log_files[index].with_name(f"{role}-{culprit}.log")
                raise ActorError(error.text, role=role, index=culprit, log_file=log_file) from error
            raise self._error(ActorError, index, f"{name}, {what}: {error.name}: {error.text}") from error
        except (TimeoutError, ray.exceptions.RayTaskError) as error:  # Ray's is of its cause's type too
            if limit.expired():
                raise self._late(index, what, deadline_s) from None
            cause = getattr(error, "cause", None)
            cause = cause if isinstance(cause, BaseException) else error
            if isinstance(cause, UserError):
                raise cause from None
            raise self._error(ActorError, index, f"{name}, {what}: {type(cause).__name__}: {cause}") from cause
        except ray.exceptions.RayActorError as error:
            raise self._died(index, error, f" during {what}") from error

    def cancel(self, reference: Reference) -> None:
        reference.mailbox.cancel(reference)

    def _late(self, index: int, what: str, deadline_s: float) -> TimeoutError:
        return TimeoutError(
            f"{self.role} {index} did not finish {what} within {deadline_s:g} s; its log: {self._log_files[index]}"
        )

    def _died(self, index: int, error: Exception, when: str) -> ActorError:
        return self._error(ActorDied, index, f"{self.role} {index} died{when} ({_why_died(error)})")

    def _error(self, kind: type[ActorError], index: int, message: str) -> ActorError:
        return kind(message, role=self.role, index=index, log_file=self._log_files[index])

    async def death(self, index: int) -> ActorError:
        """Waits as long as the actor lives; whoever waits ends it with the run."""
        try:
            await self._mail[index].actor.live.remote()
        except ray.exceptions.RayActorError as error:
            return self._died(index, error, "")
        raise AssertionError("it never answers")

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return await self.result(
            self.submit(index, method, *args, **kwargs), index=index, what=method, deadline_s=deadline_s
        )

    async def call_watched(
        self, index: int, method: str, *args: Any, what: str, deadline_s: float, patience_s: float
    ) -> Any:
        reference = self.submit(index, method, *args)
        try:
            await self._watch(index, reference, what=what, deadline_s=deadline_s, patience_s=patience_s)
            return await self.result(reference, index=index, what=what, deadline_s=deadline_s)
        except asyncio.CancelledError:
            self.cancel(reference)
            raise

    async def _watch(
        self, index: int, reference: Reference, *, what: str, deadline_s: float, patience_s: float
    ) -> None:
        """Until there is a result; raises where the actor dies, gives no sign of life, or the deadline passes."""
        actor, loop = self._mail[index].actor, asyncio.get_running_loop()
        end_s = loop.time() + deadline_s
        while not (await asyncio.wait({reference}, timeout=min(patience_s, end_s - loop.time())))[0]:
            if loop.time() >= end_s:
                raise self._late(index, what, deadline_s)
            try:
                async with asyncio.timeout(patience_s):
                    await actor.ping.remote()
            except ray.exceptions.RayActorError as error:
                raise self._died(index, error, f" during {what}") from error
            except TimeoutError:
                if reference.done():
                    break
                ray.kill(actor, no_restart=True)
                why = f"the process did not answer for {patience_s:g} s and was ended"
                raise self._error(ActorDied, index, f"{self.role} {index}, {what}: {why}") from None

    async def call_all(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> list[Any]:
        calls = [self.call(i, method, *args, deadline_s=deadline_s, **kwargs) for i in range(self.size)]
        return await first_failure(calls)

    async def build(self, cls: Callable[..., Any], each: list[dict[str, Any]], *, deadline_s: float) -> None:
        """Make the plain object inside every actor, with its own arguments."""
        self._rooms = [(cls, kwargs) for kwargs in each]
        assert len(each) == self.size, (len(each), self.size)
        await first_failure([self._build(index, deadline_s) for index in range(self.size)])

    async def _build(self, index: int, deadline_s: float) -> None:
        reference = self._mail[index].actor.build.remote(*self._rooms[index])
        await self.result(reference, index=index, what="start", deadline_s=deadline_s)

    def incarnation(self, index: int) -> Any:
        return self._mail[index]

    async def replace(self, index: int, *, seen: Any, deadline_s: float) -> None:
        """Until the new one is built, calls still go to the dead one, and fail as those before them did."""
        async with self._replacing:
            if self._mail[index] is not seen:
                return
            ray.kill(seen.actor, no_restart=True)
            new = self._made(index)
            built = new.actor.build.remote(*self._rooms[index])
            await self.result(built, index=index, what="start after a death", deadline_s=deadline_s)
            self._mail[index] = new

    async def address(self, index: int, *, deadline_s: float) -> tuple[str, int]:
        return await self.result(
            self._mail[index].actor.address.remote(), index=index, what="address", deadline_s=deadline_s
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
    """Ray's reason in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "creation task" in lines[0]:
        return lines[-1]  # the exception, below its traceback
    detail = re.search(r"Worker exit detail: (.*?)\.?( Some common causes| Worker |$)", " ".join(lines))
    if detail:
        return detail[1]
    for line in lines:
        if "cause" in line.lower() or "exit" in line.lower() or "kill" in line.lower():
            return line.rstrip(".")
    return lines[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _first_failed(references: list[Any]) -> int:
    """Of references one of which has failed."""
    for index, reference in enumerate(references):
        try:
            ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            continue
        except Exception:
            return index
    raise AssertionError("none has failed")


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
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            index = _first_failed(references)
            raise ActorError(f"engine {index}, {method}: {_first_line(cause)}", role="engine", index=index) from None
        except ray.exceptions.GetTimeoutError:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
            late = ", ".join(str(i) for i, reference in enumerate(references) if reference not in ready)
            raise TimeoutError(
                f"engine {late} did not finish {method} within weights.deadline_s={self._deadline_s:g} s"
            ) from None


class ModelCaller:
    """Asks the replicas of one reward model from inside another actor; the one with the fewest of its own calls.

    Whoever awaits it sets the deadline. Raises RuntimeError with the actor's reason.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._waiting = [0] * len(actors)

    async def __call__(self, group: Any) -> list[float]:
        replica = min(range(len(self._actors)), key=self._waiting.__getitem__)
        self._waiting[replica] += 1
        try:
            return await self._actors[replica].call.remote("scores", (group,), {})
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise RuntimeError(_first_line(cause)) from None
        finally:
            self._waiting[replica] -= 1


class Cluster:
    """A connection to Ray: a running cluster, or one of the run's own that ends with it."""

    def __init__(self, *, log_dir: Path, plugins: list[str]) -> None:
        self._log_dir = log_dir
        self._plugins = plugins
        self._groups: list[RayGroup] = []
        self._placements: dict[str, list[PlacementGroup]] = {}
        self._owned = False
        self._watches: list[asyncio.Task[ActorError]] = []
        self._death: asyncio.Future[ActorError] | None = None

    @staticmethod
    def wanted_address(address: str | None) -> str | None:
        """The cluster to join: the config's, else RAY_ADDRESS (set inside a Ray job), else none: start one."""
        if address and "://" in address:
            raise UserError(
                f"cluster.address={address}: a run joins a cluster from one of its machines (auto, or HOST:PORT); "
                "launch/submit.sh sends it to a dashboard's http address"
            )
        from_environment = os.environ.get("RAY_ADDRESS", "")
        # `ray job submit` reads a dashboard's http address from the same variable: that one is not to be joined.
        return address or (from_environment if "://" not in from_environment else "") or None

    def connect(
        self, address: str | None, *, cpus: float, gpus: int = 0, object_store_bytes: int = LOCAL_OBJECT_STORE_BYTES,
    ) -> None:
        """Join the cluster at `address`, or start one with that many CPUs and GPUs, whatever Ray itself would count."""
        address = self.wanted_address(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if address:
                ray.init(address=address, **options)
            else:
                self._owned = not ray.is_initialized()
                ray.init(
                    address="local",  # without it Ray looks for a cluster itself: RAY_ADDRESS, or what runs here
                    num_cpus=max(1, round(cpus + 0.5)),
                    num_gpus=gpus,
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
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

    def spawn(self, role: Role, *, env: dict[str, str], may_die: bool = False) -> RayGroup:
        """Start the role's actors in their places. Their objects come with `RayGroup.build`.

        Unless they `may_die`, their death is what `first_death` tells.
        """
        log_files = [self._log_dir / f"{role.name}-{i}.log" for i in range(role.count)]

        def make(index: int) -> Any:
            options = self._options(role, index) | {"runtime_env": {"env_vars": env}}
            return ray.remote(Host).options(**options).remote(str(log_files[index]), self._plugins)

        group = RayGroup(role.name, make, log_files)
        self._groups.append(group)
        for index in range(0 if may_die else group.size):
            watch = asyncio.ensure_future(group.death(index))
            watch.add_done_callback(self._found_dead)
            self._watches.append(watch)
        return group

    def _options(self, role: Role, index: int) -> dict[str, Any]:
        placements = self._placements[role.inside or role.name]
        each = role.own_group_each or role.inside is not None
        place = PlacementGroupSchedulingStrategy(
            placements[index % len(placements)] if each else placements[0],
            placement_group_bundle_index=0 if each else index,
            placement_group_capture_child_tasks=False,
        )
        return {
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "scheduling_strategy": place,
            "max_concurrency": MAX_CONCURRENT_CALLS,
            "max_restarts": 0,
        }

    def _found_dead(self, watch: asyncio.Task[ActorError]) -> None:
        if not watch.cancelled() and watch.exception() is None and not self.first_death.done():
            self.first_death.set_result(watch.result())

    @property
    def first_death(self) -> asyncio.Future[ActorError]:
        """Done when the first of the actors that may not die has died."""
        if self._death is None:
            self._death = asyncio.get_running_loop().create_future()
        return self._death

    async def close(self) -> None:
        """End the actors, give the places back, leave the cluster (and end it if it is the run's own). Never raises."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*(group.close() for group in self._groups), return_exceptions=True)
        for placed in (placed for groups in self._placements.values() for placed in groups):
            with contextlib.suppress(Exception):
                remove_placement_group(placed)
        if self._owned:
            ray.shutdown()
