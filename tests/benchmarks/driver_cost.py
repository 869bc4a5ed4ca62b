"""What the driver itself costs: CPU time, bytes through its sockets, memory. Real Ray actors, made records.

Takes:  a Session.
Gives:  `cpu`, `sockets`, `memory`; the part `run`.
Knows:  a whole run as the command line starts it; the reward workers are real, engines and ranks answer with made
        records (tests/benchmarks/made.py).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import made
from tests.benchmarks.figures import Measured
from tests.benchmarks.session import Session
from tests.benchmarks.work import PROMPT_TOKENS, Phase, make_data, options

IN_FLIGHT, QUICK_IN_FLIGHT = (10, 100, 1000), (10, 1000)
FLAT = 1.5  # a group among 100 or 1,000 may cost so many times one among 10: then the driver counts as flat
SHORT, LONG = 64, 4096  # tokens
BYTES_OF_TCP = re.compile(r"bytes_(?:sent|received):(\d+)")
HELD_S = {10: 0.05, 100: 0.3, 1000: 2.0}  # until all have been sent
WARM_UP, STEPS = 3, {10: 1000, 100: 20, 1000: 10}
QUICK_WARM_UP, QUICK_STEPS = 1, {10: 100, 1000: 2}
STEPS_LONG, QUICK_LONG = 40, 20
LOOK_EVERY = 10  # steps: to look at the sockets starts a process, which is CPU time of the driver's
MEMORY_WARM_UP = 50  # steps in which the driver grows to what it needs
MIB = 2**20
CALLS, CALL_ROUNDS, CALL_EVERY_S, CALL_BYTES = 50, 10, 0.01, 400


def _run(session: Session, groups: int, tokens: int = SHORT) -> list[dict[str, float]]:
    """The measured steps of a run with so many groups in flight."""
    steps, warm_up = (QUICK_STEPS, QUICK_WARM_UP) if session.quick else (STEPS, WARM_UP)
    num_steps = steps[groups]
    if tokens != SHORT:
        num_steps = QUICK_LONG if session.quick else STEPS_LONG
    gave = session.part("driver", groups=groups, steps=warm_up + num_steps, tokens=tokens, hold_s=HELD_S[groups])
    return gave[warm_up:]


def cpu(session: Session) -> list[Measured]:
    """Of the driver's process, all its threads (Ray's among them): CPU time of a step / its groups."""
    in_flight = QUICK_IN_FLIGHT if session.quick else IN_FLIGHT
    values = {groups: [1000 * step["cpu_s"] / groups for step in _run(session, groups)] for groups in in_flight}
    few, *many = (statistics.median(of) for of in values.values())
    results = [Measured.of(f"driver_{groups}", of, unit="ms", goal="<= 1.0", in_flight=groups)
               for groups, of in values.items()]
    if not session.quick:
        letters = statistics.mean(step["letters"] for step in _run(session, in_flight[0])) / in_flight[0]
        bare = session.part("bare_calls")
        results.append(Measured.of(f"driver_{in_flight[0]}_bare", [letters * call_ms for call_ms in bare], unit="ms",
                                   letters=letters, call_ms=statistics.median(bare)))
    return [*results, Measured.of("driver_flat", [max(many) / few], unit="x", goal=f"<= {FLAT}")]


def sockets(session: Session) -> list[Measured]:
    """TCP alone, in and out, as the kernel counts them (ss -ti): Ray's calls and their answers."""
    steps = {tokens: _run(session, 10, tokens) for tokens in (SHORT, LONG)}
    values = {tokens: _bytes_a_group(of, groups=10) for tokens, of in steps.items()}
    results = [Measured.of(f"driver_bytes_{tokens}", [count / 1024 for count in of], unit="KiB", goal="<= 2",
                           letters=statistics.mean(step["letters"] for step in steps[tokens]) / 10)
               for tokens, of in values.items()]
    equal = statistics.median(values[LONG]) / statistics.median(values[SHORT])
    return [*results, Measured.of("driver_bytes_equal", [equal], unit="x", goal="<= 1.05")]


def _bytes_a_group(steps: list[dict[str, float]], *, groups: int) -> list[float]:
    """Between one look at the sockets and the next."""
    looks = [step["tcp_bytes"] for step in steps if step["tcp_bytes"]]
    return [(b - a) / LOOK_EVERY / groups for a, b in itertools.pairwise(looks)]


def memory(session: Session) -> list[Measured]:
    """Resident memory at the end against that after the first steps, for 1,000 of them (quick: from fewer)."""
    steps = _run(session, 10)[MEMORY_WARM_UP:]
    grown = (steps[-1]["resident"] - steps[0]["resident"]) / MIB * 1000 / (len(steps) - 1)
    return [Measured.of("memory", [grown], unit="MB", goal="<= 20", steps=len(steps))]


def run(folder: Path, work: Path, *, groups: int, steps: int, tokens: int, hold_s: float) -> list[dict[str, float]]:
    """After each step: CPU seconds and letters since the one before, resident memory, now and then the bytes of all
    TCP sockets."""
    from flux_ray.config import from_dict
    from flux_ray.driver import run as train
    from flux_ray.observability.callbacks import as_callback

    os.environ[made.HOLD_S] = str(hold_s)
    made.put_in_place()
    seen: list[dict[str, float]] = []
    process, letters = psutil.Process(), _counted_letters()

    def stepped(step: int, metrics: dict[str, float]) -> None:
        seen.append({"cpu_s": time.process_time(), "letters": len(letters), "resident": process.memory_info().rss,
                     "tcp_bytes": tcp_bytes(process.pid) if step % LOOK_EVERY == 0 else 0})

    phase = Phase("made", [tokens] * 64, 0, steps)
    make_data(work / "data.jsonl", [phase])
    train(from_dict(options(folder, dtype="float32", phases=[phase]) | {
        "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
        "rollout.max_tokens": tokens, "batch.prompts_per_step": groups, "rollout.num_engines": 2,
        "rollout.max_num_seqs": 100_000, "rollout.max_model_len": PROMPT_TOKENS + tokens,
    }), callbacks=[as_callback(stepped)])
    before = [seen[0], *seen]
    return [{**now, **{name: now[name] - then[name] for name in ("cpu_s", "letters")}}
            for then, now in zip(before, seen, strict=False)]


def bare_calls(folder: Path, work: Path) -> list[float]:
    """CPU milliseconds of this process, all its threads, for a call of an empty actor and its answer: a letter's size,
    awaited one after another with a moment between them, as a step's come; what the moment costs is taken off."""
    import ray

    from flux_ray.cluster.groups import Cluster

    class Empty:
        async def call(self, letter: bytes) -> bytes:
            return bytes(CALL_BYTES)

    async def milliseconds(actor: Any) -> float:
        start_s = time.process_time()
        for _ in range(CALLS):
            if actor:
                await actor.call.remote(bytes(CALL_BYTES))
            await asyncio.sleep(CALL_EVERY_S)
        return 1000 * (time.process_time() - start_s) / CALLS

    async def measured() -> list[float]:
        actor = ray.remote(Empty).options(num_cpus=0, enable_task_events=False).remote()
        await milliseconds(actor)  # until it is there
        return [await milliseconds(actor) - await milliseconds(None) for _ in range(CALL_ROUNDS)]

    Cluster(log_dir=work, plugins=[]).connect(None, cpus=1)
    try:
        return asyncio.run(measured())
    finally:
        ray.shutdown()


def _counted_letters() -> list[None]:
    """Grows by one for each call that the driver makes from now on."""
    from flux_ray.cluster.rpc import RayActor

    letters: list[None] = []
    call = RayActor.call

    def counted(self: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        letters.append(None)
        return call(self, method, *args, **kwargs)

    RayActor.call = counted  # type: ignore[method-assign, assignment]
    return letters


def tcp_bytes(pid: int) -> int:
    """Sent and received by all TCP sockets that the process has now."""
    shown = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, timeout=30, check=True).stdout
    return count_bytes(shown, pid=pid)


def count_bytes(shown: str, *, pid: int) -> int:
    """The process's, of what ss shows: a line for each socket, and one that is indented with its counts."""
    sockets = re.split(r"\n(?=\S)", shown)
    return sum(int(count) for one in sockets if f"pid={pid}," in one for count in BYTES_OF_TCP.findall(one))
