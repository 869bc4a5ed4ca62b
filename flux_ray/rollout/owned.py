"""The groups that a rollout worker owns, and its news of them.

Takes:  news; the work on each group.
Gives:  news to the driver, many at once; arrays to training ranks; texts.
Keeps:  each group until the driver has it forgotten, which cancels the work on it. What it told a life of the run that
        is over, or was about to tell it, reaches no other one.
Never:  waits for another actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from flux_ray.clock import now_s
from flux_ray.cluster.group import CallFailed
from flux_ray.messages import Assignment, GroupAt, GroupFailed, News, OwnedGroup
from flux_ray.records import RolloutGroup, ScoredGroup, Trajectory

BATCHING_WINDOW_S = 0.005  # while other groups run, news waits so long for more; several windows where many run
GROUPS_PER_WINDOW, MOST_WINDOWS = 16, 10
NEWS_AT_LEAST_EVERY_S = 10.0  # an answer without news tells the driver that this process lives

Key = tuple[int, int]  # uid and attempt
R = TypeVar("R")


@dataclass
class Carried:
    """A group that is being made, or kept."""

    first: Assignment  # the one of the part that came first
    parts: dict[int, tuple[list[Trajectory], int]] = field(default_factory=dict)  # seed ► samples, newest step
    group: RolloutGroup | None = None  # once all parts are there
    step: int = 0  # updates that the newest policy among its tokens had
    texts: tuple[str, ...] = ()
    reference: list[np.ndarray] | None = None
    scored: ScoredGroup | None = None
    engines: dict[int, int] = field(default_factory=dict)  # seed ► the engine that sampled that part
    start_s: float = field(default_factory=now_s)
    sample_engines: list[int] = field(default_factory=list)  # of each sample, once all parts are there
    generate_s: float = 0.0  # from the first order until all parts were there
    score_s: float = 0.0
    reference_s: float = 0.0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def is_generated(self) -> bool:
        """Whether all parts are there."""
        return sum(len(part) for part, _ in self.parts.values()) == self.first.group_size

    def join(self, decode: Callable[[list[np.ndarray]], list[str]]) -> RolloutGroup:
        """Make one group of the parts, in the order of their samples' seeds, and its texts."""
        parts = [self.parts[seed] for seed in sorted(self.parts)]
        whole = replace(self.first.prompt, seed=min(self.parts), num_samples=self.first.group_size)
        self.group = RolloutGroup(whole, tuple(t for part, _ in parts for t in part))
        self.step = max(step for _, step in parts)
        self.generate_s = now_s() - self.start_s
        self.sample_engines = [self.engines[seed] for seed in sorted(self.parts) for _ in self.parts[seed][0]]
        self.texts = tuple(decode([t.token_ids[t.prompt_length :] for t in self.group.trajectories]))
        return self.group


class Owned:
    def __init__(self) -> None:
        self.carried: dict[Key, Carried] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._writing: set[asyncio.Task[Any]] = set()
        self._news: list[News] = []
        self._has_news = asyncio.Event()

    def run(self, carried: Carried, work: Awaitable[None], what: str) -> None:
        """Work on a group. What the work raises becomes news: GroupFailed."""
        def ended(task: asyncio.Task[None]) -> None:
            carried.tasks.discard(task)
            self._running.discard(task)

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                row = carried.first.prompt.where
                self.tell(GroupFailed(*carried.first.key, f"{what} of {row}", CallFailed.of(error)))

        task = asyncio.create_task(guarded())
        carried.tasks.add(task)
        self._running.add(task)
        task.add_done_callback(ended)

    def forget(self, key: Key) -> None:
        carried = self.carried.pop(key, None)
        for task in carried.tasks if carried else ():
            task.cancel()

    async def to_its_end(self, work: Coroutine[object, object, R]) -> R:
        """`work` writes files: it goes on where its caller is gone."""
        task = asyncio.create_task(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return await asyncio.shield(task)

    async def let_go(self) -> None:
        """The life of the run is over that has asked for all this. Nothing of it goes on when this returns."""
        self.carried.clear()
        self._news, self._has_news = [], asyncio.Event()
        for task in self._running:
            task.cancel()
        if going_on := self._running | self._writing:
            await asyncio.wait(going_on)

    def tell(self, news: News) -> None:
        self._news.append(news)
        self._has_news.set()

    async def news(self) -> list[News]:
        """What has become of groups since the last call, as soon as there is any."""
        has_news = self._has_news
        try:
            async with asyncio.timeout(NEWS_AT_LEAST_EVERY_S):
                await has_news.wait()
        except TimeoutError:
            return []
        if self._running:
            windows = min(MOST_WINDOWS, max(1, len(self._running) // GROUPS_PER_WINDOW))
            await asyncio.sleep(windows * BATCHING_WINDOW_S)
        if has_news is not self._has_news:  # whoever asked is gone
            return []
        has_news.clear()
        news, self._news = self._news, []
        return news

    async def give(self, groups: Sequence[GroupAt]) -> list[OwnedGroup | None]:
        """The arrays of these groups; None for one that is not here."""
        found = [self.carried.get((uid, attempt)) for _, uid, attempt in groups]
        return [OwnedGroup(one.group, one.reference, one.scored) if one and one.group else None for one in found]

    async def texts(self, keys: Sequence[Key]) -> list[str | None]:
        """The text of each group's first response; None for one that is not here."""
        found = [self.carried.get(key) for key in keys]
        return [one.texts[0] if one and one.texts else None for one in found]
