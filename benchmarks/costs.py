"""What the parts cost on this machine, and what whole runs of one and two engines take: for benchmarks.simulate.

python -m benchmarks.costs OUT.json [--hidden 128 --layers 4]

An engine alone, at several numbers of running sequences; then short runs with one engine (two batch sizes) and two.
The costs come from the engine and from the run of 32 prompts alone, with many groups in flight: with few, what a step
takes once would count for each group. The other two are there to be predicted. Equal lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

NUM_SEQUENCES = (1, 16, 64, 128, 256)
TOKENS, GROUP_SIZE, NUM_STEPS, WARM_UP = 64, 8, 8, 2
#: Name ► (engines, prompts a step).
RUNS = {"one engine, 8 prompts": (1, 8), "one engine, 32 prompts": (1, 32), "two engines, 32 prompts": (2, 32)}
GIVES_COSTS = "one engine, 32 prompts"


def config_of(folder: Path, **values: Any) -> Any:
    from flux_ray.config import from_dict

    return from_dict({
        "model.path": str(folder / "model"), "data.train": str(folder / "data.jsonl"), "reward.functions": ["length"],
        "reward.options": {"length": {"target": 10}}, "algo.beta": 0.0, "algo.entropy_coef": 0.0,
        "rollout.group_size": GROUP_SIZE, "rollout.max_tokens": TOKENS, "rollout.ignore_eos": True,
        "rollout.kv_cache_gib": 0.5, "observability.samples_per_step": 0, "observability.progress": False, **values})


def engine_alone(folder: Path) -> list[tuple[int, float]]:
    """(sequences, seconds of a decode step with so many): the least of three, first token and rest told apart."""
    from flux_ray.records import SamplingRequest
    from flux_ray.rollout.engine import RolloutEngine

    async def measure() -> list[tuple[int, float]]:
        engine = RolloutEngine(config_of(folder), index=0, device="cpu", dtype="float32", weights_backend="gloo")
        await engine.start()

        async def seconds(n: int, tokens: int) -> float:
            start_s = time.perf_counter()
            await engine.generate(SamplingRequest(np.full(16, 5, np.int32), n, seed=1, temperature=1.0,
                                                  max_tokens=tokens))
            return time.perf_counter() - start_s

        points = []
        for n in NUM_SEQUENCES:
            long_s, short_s = [min([await seconds(n, tokens) for _ in range(3)]) for tokens in (TOKENS, 1)]
            points.append((n, (long_s - short_s) / (TOKENS - 1)))
        await engine.close()
        return points

    return asyncio.run(measure())


def whole_run(folder: Path, name: str) -> dict[str, float]:
    """Medians over the steps of a run, and the driver's own CPU time for a group."""
    from flux_ray.observability.callbacks import as_callback
    from flux_ray.run import run

    engines, prompts = RUNS[name]
    cpu_s: list[float] = []
    config = config_of(folder, **{"rollout.num_engines": engines, "batch.prompts_per_step": prompts,
                                  "driver.num_steps": NUM_STEPS, "run_dir": str(folder / name.replace(" ", "-"))})
    result = run(config, callbacks=[as_callback(lambda step, metrics: cpu_s.append(time.process_time()))])
    lines = result.history[WARM_UP:]
    names = ("driver/step_s", "driver/wait_s", "train/step_s", "weights/publish_s", "rollout/s", "rollout/tokens")
    medians = {key: statistics.median(line[key] for line in lines) for key in names}
    driver_s = statistics.median(np.diff(cpu_s[WARM_UP - 1:])) / prompts
    return medians | {"driver_cpu_s": driver_s, "spread_s": float(np.subtract(*np.percentile(
        [line["driver/step_s"] for line in lines], [75, 25])))}


def costs_of(points: list[tuple[int, float]], run: dict[str, float]) -> dict[str, float]:
    """Least squares of the engine's points (relative errors); the rest from the run GIVES_COSTS.

    What the run took to generate beyond the engine's own time and the driver's CPU time is Ray's and the reward
    worker's: it is counted for each group that the worker scores.
    """
    prompts = RUNS[GIVES_COSTS][1]
    n, step_s = (np.array(column, float) for column in zip(*points, strict=True))
    (token_s, sequence_s), *_ = np.linalg.lstsq(np.stack([1 / step_s, n / step_s], 1), np.ones(len(n)), rcond=None)
    engine_s = TOKENS * (token_s + GROUP_SIZE * prompts * sequence_s)
    tokens = run["rollout/tokens"] + GROUP_SIZE * prompts * 16
    around_s = (run["driver/wait_s"] - engine_s) / prompts
    return {"token_s": float(token_s), "sequence_s": float(sequence_s), "driver_s": run["driver_cpu_s"],
            "score_s": float(max(0.0, around_s - run["driver_cpu_s"])),
            "train_token_s": run["train/step_s"] / tokens, "publish_s": run["weights/publish_s"]}


def in_its_own_process(part: str, folder: Path) -> Any:
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "flux_ray_gloo"}
    command = [sys.executable, "-m", "benchmarks.costs", "-", "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_model(folder: Path, hidden: int, layers: int) -> None:
    from tests.tiny import tiny_model

    tiny_model(folder / "model", tied=True, hidden=hidden, layers=layers, context=128)
    rows = [{"prompt": str(10**15 + i), "answer": "1"} for i in range(256)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--part")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        given = engine_alone(arguments.folder) if arguments.part == "engine" else whole_run(arguments.folder,
                                                                                           arguments.part)
        print(json.dumps(given))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments.hidden, arguments.layers)
        points = in_its_own_process("engine", Path(folder))
        runs = {name: in_its_own_process(name, Path(folder)) for name in RUNS}
    measured = {"engine": points, "runs": runs, "costs": costs_of(points, runs[GIVES_COSTS])}
    Path(arguments.out).write_text(json.dumps(measured, indent=1))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
