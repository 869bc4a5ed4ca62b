"""What the driver itself costs: CPU time, bytes through its sockets, memory. Real Ray actors, made records.

Takes:  a Session.
Gives:  `cpu`, `sockets`, `memory`; the part `run`.
Knows:  a whole run as the command line starts it; the reward workers are real, engines and ranks answer with made
        records (tests/benchmarks/made.py).
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import psutil

from tests.benchmarks import made
from tests.benchmarks.figures import Measured
from tests.benchmarks.session import Session
from tests.benchmarks.work import PROMPT_TOKENS, Phase, make_data, options

IN_FLIGHT = (10, 100, 1000)
FLAT = 1.5  # the dearest group may cost so many times the cheapest: then the driver counts as flat
SHORT, LONG = 64, 4096  # tokens
BYTES_OF_TCP = re.compile(r"bytes_(?:sent|received):(\d+)")
HELD_S = {10: 0.05, 100: 0.3, 1000: 2.0}  # until all have been sent
WARM_UP, STEPS = 2, {10: 30, 100: 6, 1000: 2}
MEMORY_STEPS, MEMORY_WARM_UP = 1000, 50
MIB = 2**20


def cpu(session: Session) -> list[Measured]:
    """Of the driver's process, all its threads (Ray's among them): CPU time of a step / its groups."""
    medians, results = {}, []
    for groups in IN_FLIGHT:
        steps = STEPS[groups] if session.quick else 10
        gave = session.part("driver", groups=groups, steps=WARM_UP + steps, tokens=SHORT, hold_s=HELD_S[groups])
        values = [1000 * step["cpu_s"] / groups for step in gave[WARM_UP - 1 :]]
        medians[groups] = statistics.median(values)
        results.append(Measured.of(f"driver_{groups}", values, unit="ms", goal="<= 1.0", in_flight=groups))
    flat = max(medians.values()) / min(medians.values())
    results.append(Measured.of("driver_flat", [flat], unit="x", goal=f"<= {FLAT}"))
    return results


def sockets(session: Session) -> list[Measured]:
    """TCP alone, in and out, as the kernel counts them (ss -ti): Ray's calls and their answers."""
    groups, medians, results = 10, {}, []
    for tokens in (SHORT, LONG):
        gave = session.part("driver", groups=groups, steps=WARM_UP + 10, tokens=tokens, hold_s=HELD_S[groups],
                            watch="sockets")
        values = [step["tcp_bytes"] / groups / 1024 for step in gave[WARM_UP - 1 :]]
        medians[tokens] = statistics.median(values)
        results.append(Measured.of(f"driver_bytes_{tokens}", values, unit="KiB", goal="<= 2", tokens=tokens))
    results.append(Measured.of("driver_bytes_equal", [medians[LONG] / medians[SHORT]], unit="x", goal="<= 1.05"))
    return results


def memory(session: Session) -> list[Measured]:
    """Resident memory at the end against that after the first 50 steps; quick: a fifth of the steps."""
    steps = MEMORY_STEPS // 5 if session.quick else MEMORY_STEPS
    gave = session.part("driver", groups=8, steps=MEMORY_WARM_UP + steps, tokens=SHORT, hold_s=0.0)
    grown = (gave[-1]["resident"] - gave[MEMORY_WARM_UP - 2]["resident"]) / MIB * MEMORY_STEPS / steps
    return [Measured.of("memory", [grown], unit="MB", goal="<= 20", steps=steps)]


def run(folder: Path, work: Path, *, groups: int, steps: int, tokens: int, hold_s: float,
        watch: str = "") -> list[dict[str, float]]:
    """Of each step: CPU seconds and TCP bytes of this process, and what it holds at its end."""
    from flux_ray.config import from_dict
    from flux_ray.driver import run as train
    from flux_ray.observability.callbacks import as_callback

    os.environ[made.HOLD_S] = str(hold_s)
    made.put_in_place()
    seen: list[dict[str, float]] = []
    process = psutil.Process()

    def stepped(step: int, metrics: dict[str, float]) -> None:
        seen.append({"cpu_s": time.process_time(), "resident": process.memory_info().rss,
                     "tcp_bytes": tcp_bytes(process.pid) if watch else 0.0})

    phase = Phase("made", [tokens] * 64, 0, steps)
    make_data(work / "data.jsonl", [phase])
    train(from_dict(options(folder, dtype="float32", phases=[phase]) | {
        "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
        "rollout.max_tokens": tokens, "batch.prompts_per_step": groups, "rollout.num_engines": 2,
        "rollout.max_num_seqs": 100_000, "rollout.max_model_len": PROMPT_TOKENS + tokens,
    }), callbacks=[as_callback(stepped)])
    return [{"cpu_s": b["cpu_s"] - a["cpu_s"], "tcp_bytes": b["tcp_bytes"] - a["tcp_bytes"],
             "resident": b["resident"]} for a, b in itertools.pairwise(seen)]


def tcp_bytes(pid: int) -> int:
    """Sent and received by all TCP sockets that the process has now."""
    shown = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, timeout=30, check=True).stdout
    return count_bytes(shown, pid=pid)


def count_bytes(shown: str, *, pid: int) -> int:
    """The process's, of what ss shows: a line for each socket, and one that is indented with its counts."""
    sockets = re.split(r"\n(?=\S)", shown)
    return sum(int(count) for one in sockets if f"pid={pid}," in one for count in BYTES_OF_TCP.findall(one))
