"""One run of the benchmark: what it is asked for, and the parts that figures share.

Takes:  a type, whether to be quick, a folder that has the models.
Gives:  Session: phases of equal and log-normal lengths, floors, runs of ours; each part runs once, whoever asks for it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.parts import run_part
from benchmarks.side_by_side import Beside
from benchmarks.work import Phase, equal, log_normal
from flux_ray.run.build import KEEP_MEMORY

EQUAL, UNEQUAL = "equal", "log_normal"
LENGTHS = {EQUAL: equal, UNEQUAL: log_normal}
FULL_TOKENS = 256  # of a response on average, beside TRL
RATIO_TOKENS = 64  # where ours is held against its own parts: what a step costs beside them shows more in a short one
BESIDE_RUNS = 3  # measured steps of each of two parts beside one another
UNEQUAL_RUNS = 3  # of ours, beside TRL
#: vLLM compiles its model where it may and there is something to compile with; that takes a start some 20 s more.
COMPILED = {"rollout.engine_args.enforce_eager": False} if shutil.which("g++") else {}
#: Engines, ranks, staleness; where each actor stays (nowhere: the system decides).
RUNS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"driver.max_staleness": 1, "cores": {"engine-0": [0], "trainer-0": [1]}},
    "both_cores": {"rollout.num_engines": 2, "train.num_ranks": 2},
    "both_cores_compiled": {"rollout.num_engines": 2, "train.num_ranks": 2, **COMPILED},
    # One engine: the fixed part of a decoding step is paid once. What runs at an update keeps its KV cache.
    "both_cores_asynchronous": {"rollout.num_engines": 1, "train.num_ranks": 2, "driver.max_staleness": 2,
                                "rollout.kv_after_update": "keep", **COMPILED},
}
BARE = ("vllm", "deepspeed")  # parts: generation, training
Seconds = dict[str, list[float]]  # of a part's steps, by phase
Floors = dict[str, tuple[float, float]]  # phase ► (generation, training)


@dataclass
class Session:
    """`tokens`: of a response on average, `ratio_tokens` in figures against ourselves; `runs`: measured steps of each
    kind, `unequal_runs` of log-normal lengths where fewer do; `lengths`: which of the two phases;
    `peer_setting`: TRL's (threads, sequences of a forward pass), None: search; `deadline_s`: of one part."""

    folder: Path
    dtype: str
    quick: bool = False
    tokens: int = FULL_TOKENS
    ratio_tokens: int = RATIO_TOKENS
    runs: int = 10
    unequal_runs: int | None = None
    lengths: Sequence[str] = (EQUAL, UNEQUAL)
    peer_setting: tuple[int, int] | None = None
    deadline_s: float = 3600.0
    _gave: dict[str, Any] = field(default_factory=dict)
    _around: dict[str, Floors] = field(default_factory=dict)  # a run of ours ► the bare parts around it

    @classmethod
    def short(cls, folder: Path, dtype: str) -> Session:
        return cls(folder, dtype, quick=True, tokens=16, ratio_tokens=16, runs=1, deadline_s=300.0)

    def part(self, name: str, *, env: dict[str, str] | None = None, again: int = 0, **asked: Any) -> Any:
        """What the part gave, or the RuntimeError that it ended with; it runs once, and once more for each `again`."""
        key = json.dumps([name, env, again, asked], sort_keys=True)
        if key not in self._gave:
            try:
                self._gave[key] = run_part(name, self.folder, deadline_s=self.deadline_s, env=env, **asked)
            except RuntimeError as error:
                self._gave[key] = error
        if isinstance(self._gave[key], RuntimeError):
            raise self._gave[key]
        return self._gave[key]

    def phases(self, *, warm_up: int = 1) -> list[dict[str, Any]]:
        """The steps of equal lengths, then those of log-normal ones, where both are asked for (quick: on what the first
        ones have warmed up)."""
        runs = {EQUAL: self.runs, UNEQUAL: min(self.runs, self.unequal_runs or self.runs)}
        warm_ups = [warm_up, 0 if self.quick else warm_up]
        return [dataclasses.asdict(Phase(name, LENGTHS[name](self.tokens), warm_ups[i], runs[name]))
                for i, name in enumerate(self.lengths)]

    def of_ratios(self) -> Session:
        """This one (what parts gave is of both) with the tokens of figures against ourselves."""
        return dataclasses.replace(self, tokens=self.ratio_tokens)

    def beside_peer(self) -> Session:
        """This one with few steps of log-normal lengths, of which TRL takes minutes for one."""
        return dataclasses.replace(self, unequal_runs=UNEQUAL_RUNS)

    def floors(self, around: str = "synchronous") -> Floors:
        """Phase ► seconds of (bare generation, bare training), medians of what was measured before and after that run
        of ours, half the steps each: what the machine does meanwhile concerns both. Where it is quick, once for all.
        """
        if self.quick:
            return _medians(self._bare(0, self.runs))
        key = json.dumps([around, self.phases()])
        if key not in self._around:
            runs = -(-self.runs // 2)
            before = self._bare(self._number_of_last_bare(), runs)
            self.ours(around)
            self._around[key] = _medians(before, self._bare(len(self._gave), runs))
        return self._around[key]

    def _number_of_last_bare(self) -> int:
        """Of what was measured last, where that was the bare parts; else a new one."""
        parts = [json.loads(key) for key in self._gave]
        return parts[-1][2] if parts and parts[-1][0] == BARE[-1] and parts[-1][2] else len(parts)

    def _bare(self, again: int, runs: int) -> tuple[Seconds, Seconds]:
        """Seconds by phase of (generation, training)."""
        phases = dataclasses.replace(self, runs=runs).phases()
        asked: dict[str, Any] = {"phases": phases, "dtype": self.dtype, "again": again}
        generation, training = BARE
        return self.part(generation, **asked), self.part(training, env=KEEP_MEMORY, **asked)  # as our ranks have it

    def floors_beside(self) -> Floors:
        """As `floors`, while the other part runs on the other core: they share caches and the way to memory."""
        phases = dataclasses.replace(self, runs=min(self.runs, BESIDE_RUNS)).phases()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, ThreadPoolExecutor(2) as side:
            parts = [side.submit(run_part, name, self.folder, deadline_s=self.deadline_s, phases=phases,
                                 dtype=self.dtype, env=KEEP_MEMORY if name == "deepspeed" else None,
                                 beside=dataclasses.asdict(Beside(folder, name, other, core)))
                     for core, (name, other) in enumerate((BARE, BARE[::-1]))]
            generation, training = (part.result() for part in parts)
        return _medians((generation, training))

    def ours(self, run: str) -> dict[str, Any]:
        """Phase ► metrics of the measured steps, notes of the ranks."""
        asked = {"cores": {}, **RUNS[run]}
        # What a run does once, such as to import what writes rollouts, it has done when the second step ends. What
        # starts before the other lengths do is still of the old ones: it passes within the bound.
        warm_up = 2 if self.quick else 2 + 2 * bool(asked.get("driver.max_staleness"))
        return self.part("ours", phases=self.phases(warm_up=warm_up), dtype=self.dtype, **asked)

    def step_s(self, run: str, phase: str) -> list[float]:
        """Seconds of each measured step."""
        return [step["driver/step_s"] for step in self.ours(run)[phase]["steps"]]


def _medians(*rounds: tuple[Seconds, Seconds]) -> Floors:
    names = rounds[0][0]
    return {name: (statistics.median([s for generation, _ in rounds for s in generation[name]]),
                   statistics.median([s for _, training in rounds for s in training[name]])) for name in names}
