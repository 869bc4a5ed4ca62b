"""Has the rollout workers write what is to outlive them, and own again what an earlier life of the run has finished.

Takes:  entries of groups that are finished.
Gives:  `keep` and `restore`, of a checkpoint's groups; `texts` and `write_rollouts`, of a step's.
Never:  sees a token: the workers write and read files that all machines see.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from flux_ray.clock import now_s
from flux_ray.cluster.group import first_failure
from flux_ray.data import PromptSource
from flux_ray.driver.entry import Entry, Key
from flux_ray.driver.stages import Stages
from flux_ray.observability.rollouts import KeptRollouts
from flux_ray.records import KeptGroup, Prompt, ScoredGroup
from flux_ray.rollout.dispatch import Lengths


class Keeping:
    def __init__(self, stages: Stages, prompts: PromptSource, lengths: Lengths) -> None:
        self._stages, self._prompts, self._lengths = stages, prompts, lengths
        #: What an earlier life of the run had finished, and the folder where it lies.
        self.kept: tuple[Sequence[KeptGroup], Path] | None = None
        self.rollouts: KeptRollouts | None = None  # None where they aren't written
        self._told: set[str] = set()  # why rollouts aren't written

    async def keep(self, uids: Collection[int], folder: Path) -> tuple[KeptGroup, ...]:
        """The workers write those of these groups that are finished, into a new folder. Those that are written."""
        of_worker: dict[int, dict[Key, Entry]] = defaultdict(dict)
        for entry in self._stages.ledger.slots:
            if entry.news and entry.uid in uids:
                of_worker[entry.worker][entry.key] = entry
        files = {worker: f"{worker}.safetensors" for worker in of_worker}
        written = await first_failure([self._stages.workers.keep(worker, list(found), folder / files[worker])
                                       for worker, found in of_worker.items()])
        return tuple(_kept(of_worker[worker][key], files[worker])
                     for worker, keys in zip(of_worker, written, strict=True) for key in keys)

    async def restore(self) -> None:
        """What was kept is READY again, oldest first."""
        if self.kept is None:
            return
        groups, folder = self.kept
        of_uid = {one.uid: (one, self._prompts.prompt(one.uid)) for one in groups}
        workers = self._stages.workers
        worker_of = {file: i % len(workers) for i, file in enumerate(sorted({one.file for one in groups}))}
        brought = await first_failure([
            workers.bring(worker, folder / file, [prompt for one, prompt in of_uid.values() if one.file == file])
            for file, worker in worker_of.items()])
        for ready in sorted(itertools.chain(*brought), key=lambda ready: ready.uid):
            one, prompt = of_uid[ready.uid]
            entry = self._stages.ledger.restore(one, ready, worker_of[one.file], now_s())
            self._stages.hold(entry, prompt, lengths=self._lengths)

    async def texts(self, entries: Sequence[Entry]) -> list[tuple[Prompt, str, ScoredGroup]]:
        """These groups, which are in training, with their first responses. Without those of a worker that has died."""
        texts = await first_failure([self._stages.workers.text(entry.worker, entry.key) for entry in entries])
        return [(self._prompts.prompt(entry.uid), text, entry.ready.scored)
                for entry, text in zip(entries, texts, strict=True) if text is not None]

    async def write_rollouts(self, step: int) -> None:
        """The step's groups, and those that were dropped since the step before. A warning where that can't be."""
        if self.rollouts is None:
            return
        written = await self._stages.workers.write_rollouts(step)
        for why_not in {one.why_not for one in written if one.why_not} - self._told:
            self._told.add(why_not)
            self._stages.warn("rollouts", why_not)
        await asyncio.to_thread(self.rollouts.written, step, sum(one.num_bytes for one in written))


def _kept(entry: Entry, file: str) -> KeptGroup:
    return KeptGroup(entry.uid, file, entry.born, entry.end_s - entry.start_s)
