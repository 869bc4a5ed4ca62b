"""A cluster whose processes outlive a run, so that several short runs pay for their start once.

Takes:  runs after one another, of one model and one set of rollout options, on equally many actors.
Gives:  KeptCluster, in the place of cluster.groups.Cluster: each run makes its trainer, reference and rewards anew in
        processes that are there already, and opens its own wire to engines that go on serving.
Never:  leaves a process behind: `end` ends them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import ray

from flux_ray.cluster.groups import Cluster, RayGroup
from flux_ray.cluster.plan import ENGINE, Plan, Role

NUM_CPUS = 12  # declared: actors share the cores that there are


class KeptGroup(RayGroup):
    """A RayGroup of actors that an earlier run may have built; engines are built and started by the first alone."""

    def __init__(self, actors: list[Any], built: set[str], role: str, log_files: list[Path]) -> None:
        super().__init__(role, lambda index: actors[index], log_files)
        self._serving = role == ENGINE and role in built
        built.add(role)

    async def build(self, cls: Any, each: list[dict[str, Any]], *, deadline_s: float) -> None:
        if not self._serving:
            await super().build(cls, each, deadline_s=deadline_s)


class KeptCluster(Cluster):
    _actors: ClassVar[dict[str, list[Any]]] = {}
    _built: ClassVar[set[str]] = set()
    _kept_places: ClassVar[dict[str, list[Any]]] = {}

    def connect(self, address: str | None, *, cpus: float, **options: Any) -> None:
        super().connect(address, cpus=NUM_CPUS, **options)
        self._owned = False

    async def place(self, plan: Plan, *, deadline_s: float) -> None:
        """Those roles that no earlier run had."""
        new = [role for role in plan.roles if role.name not in self._kept_places]
        await super().place(dataclasses.replace(plan, roles=tuple(new)), deadline_s=deadline_s)
        self._kept_places.update(self._placements)
        self._placements = dict(self._kept_places)

    def spawn(self, role: Role, *, env: dict[str, str], plugins: bool = True) -> RayGroup:
        if role.name not in self._actors:
            self._actors[role.name] = [actor.handle for actor in super().spawn(role, env=env, plugins=plugins)]
        group = KeptGroup(self._actors[role.name], self._built, role.name,
                          [self._log_dir / f"{role.name}-{i}.log" for i in range(role.count)])
        self._groups.append(group)
        return group

    async def close(self) -> None:
        """All of it stays for the next run."""

    @classmethod
    def end(cls) -> None:
        """Ends Ray and with it every actor."""
        ray.shutdown()
        for kept in (cls._actors, cls._built, cls._kept_places):
            kept.clear()
