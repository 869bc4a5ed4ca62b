"""Each algorithm on two-digit addition, seed by seed, and a table of the steps that each took to a level.

Takes:  algorithms, seeds, a number of steps, a folder; overrides for every run.
Gives:  a toy and a warm-up for each seed, a run folder for each algorithm and seed; the table, as the last lines.
Knows:  nothing of its own: it makes the toy and runs experiments of conf/, each by the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_ray import algo
from flux_ray.observability.run_folder import EVAL, read_lines
from flux_ray.toy.addition import make_addition

LEVEL = 0.8        # share of right answers that counts as learned
ACCURACY = "eval/exact_match"   # the task's reward: eval/mean has penalties on length in it
EVAL_EVERY = 5     # steps between evaluations, and so what the table tells apart


@dataclasses.dataclass(frozen=True)
class Learned:
    """How one run went."""

    algorithm: str
    seed: int
    before: float           # share of right answers before the first step
    best: float
    steps: int | None       # to LEVEL; None: not reached
    note: str = ""          # why there is no number


def learned(algorithm: str, seed: int, evaluations: list[dict[str, Any]]) -> Learned:
    """From a run's evaluations, oldest first.

    >>> learned("grpo", 0, [{"step": 5 * i, ACCURACY: score} for i, score in enumerate((.5, .7, .9))])
    Learned(algorithm='grpo', seed=0, before=0.5, best=0.9, steps=10, note='')
    """
    if not evaluations:
        return Learned(algorithm, seed, float("nan"), float("nan"), None, "no evaluation: see its run.log")
    scores = [evaluation[ACCURACY] for evaluation in evaluations]
    steps = next((e["step"] for e in evaluations if e[ACCURACY] >= LEVEL), None)
    last = evaluations[-1]["step"]
    return Learned(algorithm, seed, scores[0], max(scores), steps, "" if steps is not None else f"not in {last} steps")


def table(results: list[Learned]) -> str:
    """A line for each algorithm: steps to LEVEL by seed (best score where it wasn't reached), and the notes."""
    seeds = sorted({result.seed for result in results})
    lines = [f"{'steps to ' + str(LEVEL):<24}" + "".join(f"{'seed ' + str(seed):>14}" for seed in seeds)]
    for name in dict.fromkeys(result.algorithm for result in results):
        own = {result.seed: result for result in results if result.algorithm == name}
        cells = [_cell(own[seed]) if seed in own else "" for seed in seeds]
        notes = "; ".join(sorted({result.note for result in own.values() if result.note}))
        lines.append(f"{name:<24}{''.join(f'{cell:>14}' for cell in cells)}  {notes}".rstrip())
    return "\n".join(lines)


def _cell(result: Learned) -> str:
    return str(result.steps) if result.steps is not None else f"best {result.best:.2f}"


def warm_up(folder: Path, *, seed: int, run: Callable[[list[str]], int]) -> Path:
    """The toy and a model that knows a little of it, once for each seed; the toy's folder."""
    toy = folder / f"toy-{seed}"
    if not (toy / "warm-up" / "model").is_dir():
        make_addition(toy, seed=seed)
        code = run(["experiment=addition_sft", f"model.path={toy / 'model'}", f"data.train={toy / 'train.jsonl'}",
                    f"seed={seed}", f"run_dir={toy / 'warm-up'}"])
        if code:
            raise SystemExit(code)
    return toy


def flux_ray_train(arguments: list[str]) -> int:
    """The command line, in a process of its own: a run that breaks is a note in the table."""
    print(f"flux-ray train {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "flux_ray", "train", *arguments], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/learn.sh", description="Which algorithms learn two-digit addition.")
    parser.add_argument("--algorithms", default=",".join(algo.ALGORITHMS), help="by comma; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to work (default: runs/learn-DATE_TIME)")
    parser.add_argument("overrides", nargs="*", help="options of every run, e.g. rollout.num_engines=2")
    given = parser.parse_args()
    folder = (given.folder or Path("runs", f"learn-{time.strftime('%Y-%m-%d_%H-%M-%S')}")).resolve()
    results = []
    for seed in map(int, given.seeds.split(",")):
        toy = warm_up(folder, seed=seed, run=flux_ray_train)
        for name in given.algorithms.split(","):
            run_dir = folder / f"{name}-{seed}"
            flux_ray_train([
                f"algo={name}", "experiment=addition", f"model.path={toy / 'warm-up' / 'model'}",
                f"data.train={toy / 'train.jsonl'}", f"eval.data={toy / 'eval.jsonl'}", f"eval.every={EVAL_EVERY}",
                f"driver.num_steps={given.steps}", f"seed={seed}", f"run_dir={run_dir}", *given.overrides,
            ])
            results.append(learned(name, seed, read_lines(run_dir / EVAL)))
    print(f"\nthe runs: {folder}\n{table(results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
