"""Processes that outlive a run, so that many short runs pay for their start once.

Takes:  runs after one another on equally many ranks, whose processes have met one another, and at most as many other
        actors; those that share engines have one model and one set of rollout options.
Gives:  KeptCluster, in the place of cluster.groups.Cluster: each run makes its trainer, reference, rollouts and rewards
        anew in processes that are there already, and opens its own channel to engines that go on serving. Roles in
        `anew` are the run's own; with `other_engines` engines are made anew too, for a model or options of the run's
        own, in the same processes. `log_of`, where a kept actor writes.
Never:  leaves a process behind: `end` ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from flux_ray.cluster.groups import CLOSE_DEADLINE_S, Cluster, RayGroup
from flux_ray.cluster.plan import ENGINE, ROLLOUT, TRAINER, Plan, Role
from flux_ray.cluster.rpc import Host, RayActor

NUM_CPUS = 24  # declared: actors share the cores that there are


@dataclasses.dataclass
class Kept:
    """The actors of one role."""

    start: Callable[[int], Any]
    handles: list[Any]
    log_files: list[Path]
    serving: dict[int, bool] = dataclasses.field(default_factory=dict)  # engine ► whether the shared model and options
    shared: dict[int, Any] = dataclasses.field(default_factory=dict)  # engine ► what it is built with to serve those


class KeptGroup(RayGroup):
    """A RayGroup of actors that an earlier run may have built; an engine that serves the shared model is left alone."""

    def __init__(self, role: Role, kept: Kept, *, other_engines: bool) -> None:
        fits = role.count == len(kept.handles) if role.name == TRAINER else role.count <= len(kept.handles)
        assert fits, f"{role.name}: {len(kept.handles)} are kept, not {role.count}"
        super().__init__(role.name, lambda index: kept.handles[index], kept.log_files[: role.count])
        self._kept, self._other_engines = kept, other_engines

    async def _build(self, actor: RayActor, deadline_s: float, what: str) -> None:
        serving = self._kept.serving
        if serving.get(actor.index) and not self._other_engines:
            return
        if self.role == ENGINE and not self._other_engines:  # of the first run: later ones may need shorter contexts
            self._built_with[actor.index] = self._kept.shared.setdefault(actor.index, self._built_with[actor.index])
        if actor.index in serving:
            await actor.host(Host.close).within(deadline_s)
        await super()._build(actor, deadline_s, what)
        if self.role == ENGINE:
            serving[actor.index] = not self._other_engines

    async def replace(self, index: int, *, deadline_s: float) -> None:
        """The new one stands in the place in later runs too."""
        self[index].kill()
        self._kept.serving.pop(index, None)
        self._kept.handles[index] = self._kept.start(index)
        await super().replace(index, deadline_s=deadline_s)


class KeptCluster(Cluster):
    _kept: ClassVar[dict[str, Kept]] = {}
    _kept_places: ClassVar[dict[str, list[Any]]] = {}
    anew: ClassVar[frozenset[str]] = frozenset()  # roles whose actors are the run's own
    other_engines: ClassVar[bool] = False

    def connect(self, address: str | None, *, cpus: float, **options: Any) -> None:
        super().connect(address, cpus=NUM_CPUS, **options)
        self._owned = False

    async def place(self, plan: Plan, *, deadline_s: float) -> None:
        """Those roles that no earlier run had."""
        new = [role for role in plan.roles if role.name in self.anew or role.name not in self._kept_places]
        await super().place(dataclasses.replace(plan, roles=tuple(new)), deadline_s=deadline_s)
        self._kept_places.update({name: of for name, of in self._placements.items() if name not in self.anew})
        self._placements = {**self._kept_places, **self._placements}

    def spawn(self, role: Role, *, env: dict[str, str], plugins: bool = True) -> RayGroup:
        if role.name in self.anew:
            return super().spawn(role, env=env, plugins=plugins)
        if role.name not in self._kept:
            first = super().spawn(role, env=env, plugins=plugins)
            self._groups.remove(first)
            self._kept[role.name] = Kept(first._make, [actor.handle for actor in first], first._log_files)
        self._groups.append(KeptGroup(role, self._kept[role.name], other_engines=self.other_engines))
        return self._groups[-1]

    async def close(self) -> None:
        """What is the run's own; all else stays for the next run. Rollouts end their own children."""
        closing = [group.close() if group.role in self.anew else _closed(group) for group in self._groups]
        await asyncio.gather(*closing, return_exceptions=True)
        for placed in (placed for name in self.anew for placed in self._placements.get(name, ())):
            remove_placement_group(placed)

    @classmethod
    def log_of(cls, role: str, index: int = 0) -> Path:
        return cls._kept[role].log_files[index]

    @classmethod
    def end(cls) -> None:
        """Ends Ray and with it every actor."""
        ray.shutdown()
        for kept in (cls._kept, cls._kept_places):
            kept.clear()


async def _closed(group: RayGroup) -> None:
    for actor in group if group.role == ROLLOUT else ():
        with contextlib.suppress(Exception):
            await actor.host(Host.close).within(CLOSE_DEADLINE_S)


@contextmanager
def kept_processes(*, anew: Collection[str] = (), other_engines: bool = False) -> Iterator[None]:
    """Runs within it are on processes that are kept, but for these roles."""
    with pytest.MonkeyPatch.context() as patch:
        cluster = type("PartlyKept", (KeptCluster,), {"anew": frozenset(anew), "other_engines": other_engines})
        patch.setattr("flux_ray.cluster.groups.Cluster", cluster)
        yield
