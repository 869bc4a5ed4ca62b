"""What the driver itself costs: CPU time, bytes through its sockets, memory. Real Ray actors, made records.

Takes:  a Session.
Gives:  `cpu`, `sockets`, `memory`; the part `run`.
Knows:  a whole run as the command line starts it; the reward workers are real, engines and ranks answer with made
        records (tests/fakes/instant.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Measured
from benchmarks.session import Session
from benchmarks.work import PROMPT_TOKENS, Phase, make_data, options
from tests.fakes import instant

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
WORKERS, GROUPS_EACH, WORKER_STEPS = 32, 64, 8
CARRIERS = ("rollout", "reward")  # roles whose actors' CPU time is counted beside the driver's
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
        calls = statistics.mean(step["calls"] for step in _run(session, in_flight[0])) / in_flight[0]
        bare = session.part("bare_calls")
        results.append(Measured.of(f"driver_{in_flight[0]}_bare", [calls * call_ms for call_ms in bare], unit="ms",
                                   calls=calls, call_ms=statistics.median(bare)))
    return [*results, Measured.of("driver_flat", [max(many) / few], unit="x", goal=f"<= {FLAT}")]


def workers(session: Session) -> list[Measured]:
    """CPU time of a group with 32 rollout workers, 64 groups each: the driver's, and that of all that carry and score
    it. Engines and ranks are made; with `_made` so are rewards."""
    results = []
    for ending, rewards in (("", False), ("_made", True)):
        steps = session.part("driver", groups=WORKERS * GROUPS_EACH, steps=WARM_UP + WORKER_STEPS, tokens=SHORT,
                             hold_s=HELD_S[1000], num_workers=WORKERS, made_rewards=rewards)[WARM_UP:]
        each = {name: [1000 * step[name] / WORKERS / GROUPS_EACH for step in steps] for name in ("cpu_s", *CARRIERS)}
        about = {f"{name}_ms": round(statistics.median(each[name]), 3) for name in CARRIERS}
        results += [Measured.of(f"driver_workers{ending}", each["cpu_s"], unit="ms", goal="<= 0.25"),
                    Measured.of(f"workers{ending}", [sum(of) for of in zip(*each.values(), strict=True)], unit="ms",
                                **about)]
    return results


def sockets(session: Session) -> list[Measured]:
    """TCP alone, in and out, as the kernel counts them (ss -ti): Ray's calls and their answers."""
    steps = {tokens: _run(session, 10, tokens) for tokens in (SHORT, LONG)}
    values = {tokens: _bytes_a_group(of, groups=10) for tokens, of in steps.items()}
    results = [Measured.of(f"driver_bytes_{tokens}", [count / 1024 for count in of], unit="KiB", goal="<= 2",
                           calls=statistics.mean(step["calls"] for step in steps[tokens]) / 10)
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


def run(folder: Path, work: Path, *, groups: int, steps: int, tokens: int, hold_s: float,
        num_workers: int | None = None, made_rewards: bool = False) -> list[dict[str, float]]:
    """After each step: CPU seconds and calls since the one before, resident memory, now and then the bytes of all
    TCP sockets; with `num_workers` the CPU seconds of those rollout workers and of reward workers."""
    from flux_ray.config import from_dict
    from flux_ray.observability.callbacks import as_callback
    from flux_ray.run import run as train

    os.environ[instant.HOLD_S] = str(hold_s)
    instant.put_in_place(rewards=made_rewards)
    seen: list[dict[str, float]] = []
    process, calls = psutil.Process(), _counted_calls()

    def stepped(step: int, metrics: dict[str, float]) -> None:
        seen.append({"cpu_s": time.process_time(), "calls": len(calls), "resident": process.memory_info().rss,
                     "tcp_bytes": tcp_bytes(process.pid) if step % LOOK_EVERY == 0 else 0}
                    | (cpu_of(CARRIERS, work / "run") if num_workers else {}))

    phase = Phase("made", [tokens] * 64, 0, steps)
    make_data(work / "data.jsonl", [phase])
    train(from_dict(options(folder, dtype="float32", phases=[phase]) | {
        "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
        "rollout.max_tokens": tokens, "batch.prompts_per_step": groups, "rollout.num_engines": 2,
        "rollout.max_num_seqs": 100_000, "rollout.max_model_len": PROMPT_TOKENS + tokens,
        "observability.rollouts_max_gib": 0.0,  # benchmarks.rollouts_cost measures that
    } | ({"rollout.num_workers": num_workers} if num_workers else {})), callbacks=[as_callback(stepped)])
    before = [seen[0], *seen]
    counted = {"cpu_s", "calls", *CARRIERS}
    return [{name: value - then[name] if name in counted else value for name, value in now.items()}
            for then, now in zip(before, seen, strict=False)]


def bare_calls(folder: Path, work: Path) -> list[float]:
    """CPU milliseconds of this process, all its threads, for a call of an empty actor and its answer: an order's size,
    awaited one after another with a moment between them, as a step's come; what the moment costs is taken off."""
    import ray

    from flux_ray.cluster.groups import Cluster

    class Empty:
        async def call(self, order: bytes) -> bytes:
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


def _counted_calls() -> list[None]:
    """Grows by one for each call that the driver makes from now on."""
    from flux_ray.cluster.rpc import RayActor

    calls: list[None] = []
    call = RayActor.call

    def counted(self: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return call(self, method, *args, **kwargs)

    RayActor.call = counted  # type: ignore[method-assign, assignment]
    return calls


def cpu_of(roles: Iterable[str], run_dir: Path) -> dict[str, float]:
    """CPU seconds so far of all actors of each role: their output goes to a file that has their name."""
    seconds = dict.fromkeys(roles, 0.0)
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
            role = output.stem.rpartition("-")[0]
            if run_dir in output.parents and role in seconds:
                seconds[role] += sum(process.cpu_times()[:2])
    return seconds


def tcp_bytes(pid: int) -> int:
    """Sent and received by all TCP sockets that the process has now."""
    shown = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, timeout=30, check=True).stdout
    return count_bytes(shown, pid=pid)


def count_bytes(shown: str, *, pid: int) -> int:
    """The process's, of what ss shows: a line for each socket, and one that is indented with its counts."""
    sockets = re.split(r"\n(?=\S)", shown)
    return sum(int(count) for one in sockets if f"pid={pid}," in one for count in BYTES_OF_TCP.findall(one))
