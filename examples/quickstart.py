"""The main job by one command: a tiny model learns two-digit addition, supervised first, then by GRPO.

Takes:  a folder to work in, a seed.
Gives:  the toy's data and model, two run folders, and `accuracy BEFORE -> AFTER in SECONDS s` as the last line.
Knows:  nothing of its own: it makes the toy and runs two experiments of conf/, as anybody would.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from examples.addition import make_addition
from flux_ray.__main__ import main as flux_ray_command
from flux_ray.observability.page.report import REPORT
from flux_ray.observability.run_folder import EVAL, read_lines

STARTED = "FLUX_RAY_STARTED_S"  # when the run began, in the environment: seconds since 1970
NUM_SHOWN = 8  # prompts printed with their answers before and after


def quickstart(folder: Path, *, seed: int, overrides: list[str]) -> int:
    """Make, warm up, train, compare; gives an exit code. `overrides` go to the GRPO run."""
    started_s = float(os.environ.get(STARTED, time.time()))
    folder = folder.resolve()
    print(f"making two-digit addition and a model with random weights in {folder}", flush=True)
    toy = make_addition(folder / "toy", seed=seed)
    data = [f"data.train={toy / 'train.jsonl'}", f"seed={seed}"]
    if torch.cuda.device_count() in (1, 2):  # shared by all, or one for the engine and one for a rank
        data.append("train.num_ranks=1")
    warm_up = ["experiment=addition_sft", f"model.path={toy / 'model'}", f"run_dir={folder / 'warm-up'}", *data]
    grpo = [
        "experiment=addition",
        f"model.path={folder / 'warm-up' / 'model'}",
        f"run_dir={folder / 'grpo'}",
        *data,
        f"eval.data={toy / 'eval.jsonl'}",
        *overrides,
    ]
    for name, arguments in (("supervised warm-up", warm_up), ("GRPO", grpo)):
        print(f"{name}: flux-ray train {' '.join(arguments)}", flush=True)
        exit_code = flux_ray_command(["train", *arguments])
        if exit_code:
            return exit_code
    before, *_, after = read_lines(folder / "grpo" / EVAL)
    print(f"\n{'prompt':>8}  {'before':>8}  {'after':>8}")
    for old, new in list(zip(before["answers"], after["answers"], strict=True))[:NUM_SHOWN]:
        print(f"{old['prompt']:>8}  {_marked(old):>8}  {_marked(new):>8}")
    print(f"\nthe run: {folder / 'grpo'} (metrics.jsonl, eval.jsonl, model/)")
    print(f"look at it: flux-ray view {shlex.quote(str(folder / 'grpo'))}   or open {folder / 'grpo' / REPORT}")
    print(
        f"accuracy {before['eval/mean']:.2f} -> {after['eval/mean']:.2f} in {time.time() - started_s:.0f} s", flush=True
    )
    return 0


def _marked(answer: dict[str, Any]) -> str:
    return f"{answer['completion']}{' +' if answer['reward'] else ' -'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/quickstart.sh", description="A tiny model learns two-digit addition.")
    parser.add_argument("--folder", type=Path, help="where to work (default: runs/quickstart-DATE_TIME)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="options of the GRPO run, e.g. driver.num_steps=20")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs", f"quickstart-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return quickstart(folder, seed=arguments.seed, overrides=arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
