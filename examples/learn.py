"""Each algorithm on two-digit addition, seed by seed, and a table of the steps that each took to a level.

Takes:  algorithms, seeds, a number of steps, a folder; overrides for every run.
Gives:  a toy and a warm-up for each seed, a run folder for each algorithm and seed; table.txt, anew after every run.
Knows:  nothing of its own: it makes the toy and runs experiments of conf/, each by the command line. A run ends at
        the level; one that has its model is done and stays, one that broke off starts anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.addition import make_addition
from flux_ray import algo
from flux_ray.errors import UserError, unknown
from flux_ray.observability.run_folder import EVAL, read_lines

LEVEL = 0.8        # share of right answers that counts as learned
ACCURACY = "eval/task_mean"   # the share of right answers: eval/mean has penalties on length in it
EVAL_EVERY = 5     # steps between evaluations, and so what the table tells apart
TABLE = "table.txt"


@dataclasses.dataclass(frozen=True)
class Learned:
    """How one run went."""

    algorithm: str
    seed: int
    before: float           # share of right answers before the first step
    best: float
    steps: int | None       # to LEVEL; None: not reached
    note: str = ""          # why there is no number


def learned(algorithm: str, seed: int, evaluations: list[dict[str, Any]], *, ended: bool = True) -> Learned:
    """From a run's evaluations, oldest first. `ended`: it ran all its steps, or to the level.

    >>> learned("grpo", 0, [{"step": 5 * i, ACCURACY: score} for i, score in enumerate((.5, .7, .9))])
    Learned(algorithm='grpo', seed=0, before=0.5, best=0.9, steps=10, note='')
    """
    if not evaluations:
        return Learned(algorithm, seed, math.nan, math.nan, None, f"seed {seed}: no evaluation, see its run.log")
    scores = [evaluation[ACCURACY] for evaluation in evaluations]
    steps = next((e["step"] for e in evaluations if e[ACCURACY] >= LEVEL), None)
    last = evaluations[-1]["step"]
    missed = f"not in {last} steps" if ended else f"seed {seed}: no further than step {last}"
    return Learned(algorithm, seed, scores[0], max(scores), steps, "" if steps is not None else missed)


def table(results: list[Learned]) -> str:
    """A line for each algorithm: steps to LEVEL by seed (best score where it wasn't reached), and the notes."""
    seeds = sorted({result.seed for result in results})
    before = {result.seed: f"{result.before:.2f}" for result in results if not math.isnan(result.before)}
    lines = [_line(f"steps to {LEVEL}", [f"seed {seed}" for seed in seeds], "")]
    for name in dict.fromkeys(result.algorithm for result in results):
        own = {result.seed: result for result in results if result.algorithm == name}
        notes = sorted({result.note for result in own.values() if result.note})
        lines.append(_line(name, [_cell(own.get(seed)) for seed in seeds], "; ".join(notes)))
    return "\n".join([*lines, _line("before the first step", [before.get(seed, "") for seed in seeds], "")])


def _line(name: str, cells: list[str], notes: str) -> str:
    return f"{name:<24}{''.join(f'{cell:>12}' for cell in cells)}  {notes}".rstrip()


def _cell(result: Learned | None) -> str:
    if result is None:
        return ""
    return str(result.steps) if result.steps is not None else f"best {result.best:.2f}"


def warm_up(folder: Path, *, seed: int, run: Callable[[list[str]], int]) -> Path:
    """The toy and a model that knows a little of it, once for each seed; the toy's folder."""
    toy = folder / f"toy-{seed}"
    warmed = toy / "warm-up"
    if not (warmed / "model").is_dir():
        shutil.rmtree(toy, ignore_errors=True)
        make_addition(toy, seed=seed)
        code = run(["experiment=addition_sft", f"model.path={toy / 'model'}", f"data.train={toy / 'train.jsonl'}",
                    f"seed={seed}", f"run_dir={warmed}"])
        if code:
            raise SystemExit(code)
    return toy


def flux_ray_train(arguments: list[str]) -> int:
    """The command line, in a process of its own: a run that breaks is a note in the table."""
    print(f"flux-ray train {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "flux_ray", "train", *arguments], check=False).returncode


def learn(folder: Path, names: list[str], seeds: list[int], *, options: list[str],
          run: Callable[[list[str]], int] = flux_ray_train) -> None:
    """Every run that isn't done yet, each seed's after one another; the table after each."""
    for seed in seeds:
        toy = warm_up(folder, seed=seed, run=run)
        for name in names:
            run_dir = folder / f"{name}-{seed}"
            if (run_dir / "model").is_dir():
                continue
            shutil.rmtree(run_dir, ignore_errors=True)
            run([f"algo={name}", "experiment=addition", f"model.path={toy / 'warm-up' / 'model'}",
                 f"data.train={toy / 'train.jsonl'}", f"eval.data={toy / 'eval.jsonl'}", f"eval.every={EVAL_EVERY}",
                 f"eval.stop_at={LEVEL}", f"seed={seed}", f"run_dir={run_dir}", *options])
            write_table(folder, names, seeds)


def write_table(folder: Path, names: list[str], seeds: list[int]) -> None:
    """Print what there is of these runs, and keep it in the folder."""
    runs = [(name, seed, folder / f"{name}-{seed}") for name in names for seed in seeds]
    results = [learned(name, seed, read_lines(run_dir / EVAL), ended=(run_dir / "model").is_dir())
               for name, seed, run_dir in runs if run_dir.is_dir()]
    text = table(results)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    print(f"\nthe runs: {folder}\n{text}\n", flush=True)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch/learn.sh", description="Which algorithms learn two-digit addition.")
    parser.add_argument("--algorithms", default=",".join(algo.ALGORITHMS), help="by comma; default: all")
    parser.add_argument("--seeds", default="0,1,2", type=_numbers, help="by comma; default: 0,1,2")
    parser.add_argument("--steps", type=int, help="most steps of a run; default: the experiment's")
    parser.add_argument("--folder", type=Path, help="where to work, or to go on (default: runs/learn-DATE_TIME)")
    parser.add_argument("--table", action="store_true", help="run nothing: show the table of what is in --folder")
    parser.add_argument("overrides", nargs="*", help="options of every run, e.g. rollout.num_engines=2")
    given = parser.parse_args(argv)
    names, seeds = given.algorithms.split(","), given.seeds
    try:
        for name in names:
            if name not in algo.ALGORITHMS:
                raise unknown("algorithm", name, algo.ALGORITHMS)
        if given.table and not (given.folder and given.folder.is_dir()):
            raise UserError(f"--table needs --folder with runs in it, got {given.folder}")
    except UserError as error:
        parser.error(str(error))
    folder = (given.folder or Path("runs", f"learn-{time.strftime('%Y-%m-%d_%H-%M-%S')}")).resolve()
    if not given.table:
        steps = [] if given.steps is None else [f"driver.num_steps={given.steps}"]
        try:
            learn(folder, names, seeds, options=[*steps, *given.overrides])
        except KeyboardInterrupt:
            print(f"interrupted: --folder {folder} goes on from here")
            return 130
    write_table(folder, names, seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
