"""The cluster, groups of actors and their placement, on Ray.

Takes:  a Plan, and plain classes to make actors of.
Gives:  `Cluster` (connect, place, spawn, close) and `RayGroup`, a Group.
Knows:  what each actor was built with, so that another can stand in its place.
Keeps:  the placement groups and actors it made, to end them.
Never:  waits without a deadline; leaves a process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray._private import ray_constants, services, utils
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flux_ray.cluster import tokens
from flux_ray.cluster.group import ActorDied, ActorError, ServerLost, first_failure
from flux_ray.cluster.joined_ray import JoinedRay
from flux_ray.cluster.own_ray import OwnRay
from flux_ray.cluster.plan import Plan, Role, describe
from flux_ray.cluster.rpc import Host, RayActor
from flux_ray.cluster.scratch import Scratch
from flux_ray.errors import UserError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of the run's own, on CPU
MAX_CONCURRENT_CALLS = 100_000  # of one actor. Never reached: a call that frees others must not queue behind them
CONNECT_DEADLINE_S = 10.0  # for a cluster's port to take a connection
CLOSE_DEADLINE_S = 5.0  # for an actor to end its own children before it is killed

T = TypeVar("T")


class RayGroup(Generic[T]):
    """Hosts of one role; `make(i)` starts the one at index i."""

    of_one_machine = False  # all actors of the run are on one

    def __init__(self, role: str, make: Callable[[int], ActorHandle], log_files: list[Path]) -> None:
        self.role = role
        self._make = make
        self._log_files = log_files
        self._built_with: list[tuple[Callable[..., object], Mapping[str, object]]] = []
        self._actors = [self._made(index) for index in range(len(log_files))]

    def _made(self, index: int) -> RayActor:
        # Unlike any other actor's, at this index or in another run on the same cluster.
        incarnation = f"{self.role} {index} #{uuid.uuid4().hex[:8]}"
        return RayActor(self._make(index), self.role, index, incarnation, self._log_files[index])

    def __len__(self) -> int:
        return len(self._actors)

    def __getitem__(self, index: int) -> RayActor:
        return self._actors[index]

    def __iter__(self) -> Iterator[RayActor]:
        return iter(list(self._actors))

    async def build(self, cls: Callable[..., T], each: Sequence[Mapping[str, object]], *, deadline_s: float) -> None:
        """Make the plain object inside every actor, with its own arguments."""
        assert len(each) == len(self), (len(each), len(self))
        self._built_with = [(cls, kwargs) for kwargs in each]
        await first_failure([self._build(self[index], deadline_s, "start") for index in range(len(self))])

    async def _build(self, actor: RayActor, deadline_s: float, what: str) -> None:
        await actor.host(Host.build, *self._built_with[actor.index]).within(deadline_s, what=what)

    async def address(self, index: int, *, deadline_s: float) -> tuple[str, int]:
        return await self[index].host(Host.address, self.of_one_machine).within(deadline_s)

    async def death(self, index: int) -> ActorError:
        """Waits as long as the actor lives; whoever waits ends it with the run."""
        actor = self[index]
        try:
            await actor.handle.live.remote()
        except ray.exceptions.RayActorError as error:
            return actor.died(error, "")
        raise AssertionError("it never answers")

    async def replace(self, index: int, *, deadline_s: float) -> None:
        """Until the new actor is built, calls still go to the dead one, and fail as before."""
        self[index].kill()
        new = self._made(index)
        await self._build(new, deadline_s, "start after a death")
        self._actors[index] = new

    async def leave(self) -> None:
        """Have the actors end themselves: their Ray has no server any more, which would end them. Never raises."""
        await asyncio.gather(*(_quietly(actor, Host.leave, CLOSE_DEADLINE_S) for actor in self))

    async def close(self, *, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Ask each object to close, then end the actors. Never raises."""
        closing = [asyncio.ensure_future(_quietly(actor, Host.close, deadline_s)) for actor in self]
        await asyncio.gather(*closing, return_exceptions=True)
        for actor in self:
            with contextlib.suppress(Exception):
                actor.kill()


async def _quietly(actor: RayActor, method: Callable[..., object], deadline_s: float) -> None:
    with contextlib.suppress(Exception):
        await actor.host(method).within(deadline_s)


def _closed(address: str) -> str | None:
    """Why nobody is reached at HOST:PORT; None where somebody listens. Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():   # Ray's own word
        return None
    why = ""
    for name in dict.fromkeys((host.strip("[]"), services.resolve_ip_for_localhost(host))):
        try:
            socket.create_connection((name, int(port)), timeout=CONNECT_DEADLINE_S).close()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
        else:
            return None
    return why


@contextlib.contextmanager
def _own_session() -> Iterator[None]:
    """Ray's processes that start within are in a session of their own.

    A signal to the driver's process group (a scheduler's SIGTERM, a terminal's hang-up) reaches the driver alone, which
    then ends them in their order. If Ray got it too, the driver would wait a minute for a Ray that is gone.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts within listens on 127.0.0.1 alone, with the ports of its metrics too.

    It does so by itself on Windows and macOS. Where it is asked for that address, it takes the machine's instead.
    """
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray, which starts within, leaves SIGTERM to this process.

    Its own handler raises SystemExit wherever the program is: in a `__del__`, say, where it is lost with the signal.
    """
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler


class Cluster:
    """A connection to Ray: a running cluster, or one of the run's own that ends with it."""

    def __init__(self, *, log_dir: Path, plugins: list[str]) -> None:
        self._log_dir = log_dir
        self._plugins = plugins
        self._groups: list[RayGroup[Any]] = []
        self._placements: dict[str, list[PlacementGroup]] = {}
        self._own: OwnRay | None = None  # where Ray is the run's own
        self._joined: JoinedRay | None = None  # else
        self._scratch: Scratch | None = None  # of its actors
        self.stands = False  # actors of a life that is over stand here, and wait for the next one
        self.epoch = 0  # of the members that they know

    @staticmethod
    def wanted_address(address: str | None) -> str | None:
        """The cluster to join: the config's, else RAY_ADDRESS (set inside a Ray job); None: start one."""
        said, wanted = "cluster.address", address
        if not wanted:
            said, wanted = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "").strip()
            # `ray job submit` reads a dashboard's http address from the same variable: that one is not to be joined.
            wanted = "" if wanted.startswith(("http://", "https://")) else wanted
        if "://" in wanted:
            raise UserError(
                f"{said}={wanted}: a run joins a cluster from one of its machines (auto, or HOST:PORT); "
                "launch/submit.sh sends it to a dashboard's http address"
            )
        return None if wanted in ("", "local") else wanted   # local: Ray's word for one of the run's own

    def connect(
        self, address: str | None, *, cpus: float, gpus: int = 0, object_store_bytes: int = LOCAL_OBJECT_STORE_BYTES,
        allow_open: bool = False, server_deadline_s: float = 10.0,
    ) -> None:
        """Join the cluster at `address`, or start one with that many CPUs and GPUs, whatever Ray itself would count.

        `server_deadline_s`: how long the server of one that is joined may be silent.
        UserError where nobody answers, or anybody would be answered (unless `allow_open`).
        """
        address = self.wanted_address(address)
        closed = _closed(address) if address else None
        if closed:
            raise UserError(f"no Ray cluster answers at cluster.address={address}: {closed}")
        options: dict[str, object] = {
            "log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if address:
                with _own_signals():
                    ray.init(address=address, **options)
                if not allow_open:
                    tokens.check_closed(address)
            else:
                starts = not ray.is_initialized()
                with _own_session(), _own_signals(), _on_loopback():
                    ray.init(
                        address="local",  # without it Ray looks for a cluster itself: RAY_ADDRESS, or what runs here
                        num_cpus=max(1, round(cpus + 0.5)),
                        num_gpus=gpus,
                        include_dashboard=False,
                        object_store_memory=object_store_bytes,
                        **options,
                    )
                if starts:
                    self._scratch = Scratch()
                    self._own = OwnRay(self._scratch.folder)
            if self._own is None:
                self._joined = JoinedRay(ray.get_runtime_context().gcs_address, deadline_s=server_deadline_s)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"no Ray cluster answers at cluster.address={address}: {str(error).splitlines()[0]}{tokens.hint()}"
            ) from None

    async def death(self) -> ActorDied | ServerLost:
        """Waits until a part of Ray itself has died; where a Ray was joined that others started, its server."""
        watched = self._own or self._joined
        assert watched is not None, "not connected"
        return await watched.death()

    def num_gpus(self) -> int:
        self._refuse_dead()
        return int(ray.cluster_resources().get("GPU", 0))

    def _refuse_dead(self) -> None:
        """Before what only Ray's server can answer: without it Ray waits for a minute, and then ends this process."""
        watched = self._own or self._joined
        if watched is not None and (death := watched.dead) is not None:
            raise death

    @functools.cached_property
    def _host(self) -> Any:
        """One class for all actors: Ray sends each new one to its server, which may be dead when one is replaced."""
        return ray.remote(Host)

    async def place(self, plan: Plan, *, deadline_s: float) -> None:
        """Reserve every bundle of the plan, all within the deadline.

        UserError names what can't be placed, and what the cluster has.
        """
        self._refuse_dead()
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

    def spawn(self, role: Role, *, env: dict[str, str], plugins: bool = True) -> RayGroup[Any]:
        """Start the role's actors in their places. `RayGroup.build` makes their objects.

        `plugins`: whether the actors import users' files.
        """
        log_files = [self._log_dir / f"{role.name}-{i}.log" for i in range(role.count)]
        env = (self._scratch.env if self._scratch is not None else {}) | env

        def make(index: int) -> ActorHandle:
            options = self._options(role, index) | {"runtime_env": {"env_vars": env}}
            return self._host.options(**options).remote(str(log_files[index]), self._plugins if plugins else [])

        group: RayGroup[Any] = RayGroup(role.name, make, log_files)
        group.of_one_machine = self._own is not None
        self._groups.append(group)
        return group

    def standing(self, role: str) -> RayGroup[Any] | None:
        """The actors of that role, where there are any."""
        return next((group for group in self._groups if group.role == role), None)

    def end_role(self, role: str) -> None:
        """End the actors of that role at once, where there are any. Their places stay."""
        group = self.standing(role)
        if group is not None:
            self._groups.remove(group)
            for actor in group:
                actor.kill()

    def _options(self, role: Role, index: int) -> dict[str, object]:
        placements = self._placements[role.inside or role.name]
        each = role.own_group_each or role.inside is not None
        place = PlacementGroupSchedulingStrategy(
            placements[role.hosts[index] if role.inside else index] if each else placements[0],
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

    async def close(self) -> None:
        """End the actors, give the places back, leave the cluster (and end it if it is the run's own). Never raises."""
        try:
            if self._own is not None and self._own.dead:
                self._own.kill()  # nobody would answer
            elif self._joined is not None and self._joined.dead:
                await asyncio.gather(*(group.leave() for group in self._groups), return_exceptions=True)
            else:
                await self._give_back()
        finally:
            if self._own is not None:
                ray.shutdown()
                self._own.end()
            if self._scratch is not None:
                self._scratch.remove()

    def kill(self) -> None:
        """End a Ray of the run's own, with all actors, at once. A cluster that was joined does so when the driver ends.
        """
        if self._own is not None:
            self._own.kill()

    async def _give_back(self) -> None:
        await asyncio.gather(*(group.close() for group in self._groups), return_exceptions=True)
        for placed in (placed for groups in self._placements.values() for placed in groups):
            with contextlib.suppress(Exception):
                remove_placement_group(placed)
