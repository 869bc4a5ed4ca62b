"""All figures in one run: `launch/bench.sh [--quick] [--json] [--only NAME,NAME] [--runs N] [--tokens N] [--dtype D]`.

Takes:  which figures, and how long it may take.
Gives:  a table, or with --json an object a line as soon as a figure is there. What each is: docs/benchmarks.md.
Knows:  a figure that fails is told as such and the others go on; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import FIGURES, Failed, Figure, Measured, as_json, chosen, table
from benchmarks.session import LENGTHS, Session
from benchmarks.work import SIZES, make_model
from flux_ray.errors import UserError
from flux_ray.model import slow_dtype

DTYPES = ("bfloat16", "float32")


def usual_dtype() -> str:
    """bfloat16, but for a processor that emulates it: 64 sequences of 16 tokens then take vLLM 150 s."""
    return DTYPES[slow_dtype(DTYPES[0], "cpu") is not None]


def measure(figure: Figure, session: Session) -> list[Measured | Failed]:
    module, _, function = figure.measure.partition(":")
    try:
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)(session)
    except Exception as error:
        if not isinstance(error, RuntimeError):
            traceback.print_exc()
        return [Failed(figure.name, f"{type(error).__name__}: {error}")]


def measure_all(figures: Sequence[Figure], session: Session, *, as_lines: bool) -> list[Measured | Failed]:
    """`as_lines`: each result is printed as soon as it is there."""
    started_s, results = time.monotonic(), []
    for figure in figures:
        print(f"{time.monotonic() - started_s:5.0f} s  {figure.name}: {figure.meaning}", file=sys.stderr, flush=True)
        for result in measure(figure, session):
            results.append(result)
            if as_lines:
                print(as_json(result), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/bench.sh", description="Measures what docs/benchmarks.md describes.")
    parser.add_argument("--quick", action="store_true", help="shorter responses, fewer runs")
    parser.add_argument("--json", action="store_true", help="an object a line instead of the table")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"some of: {', '.join(FIGURES)}")
    parser.add_argument("--runs", type=int, metavar="N", help="measured steps of each kind (10; with --quick 1)")
    parser.add_argument("--tokens", type=int, metavar="N",
                        help="of a response on average (beside TRL 256, else 64; with --quick 16)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of weights and activations; bfloat16 where the processor has it, else float32")
    parser.add_argument("--lengths", choices=tuple(LENGTHS), help="of responses: one of the two kinds alone")
    parser.add_argument("--trl", type=int, nargs=2, metavar=("THREADS", "BATCH"),
                        help="TRL's setting, where a search has found it before")
    arguments = parser.parse_args()
    try:
        figures = chosen(arguments.only)
    except UserError as error:
        parser.error(str(error))
    for option, least in (("runs", 1), ("tokens", 8), ("trl", 1)):
        value = getattr(arguments, option)
        if value is not None and min([value] if isinstance(value, int) else value) < least:
            parser.error(f"--{option} {value}: at least {least}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended with us
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flux-ray-bench-") as folder:
        for size in SIZES:
            make_model(Path(folder, size), size)
        session = (Session.short if arguments.quick else Session)(Path(folder), arguments.dtype or usual_dtype())
        session.runs, session.tokens = arguments.runs or session.runs, arguments.tokens or session.tokens
        session.ratio_tokens = arguments.tokens or session.ratio_tokens
        session.lengths = (arguments.lengths,) if arguments.lengths else session.lengths
        session.peer_setting = tuple(arguments.trl) if arguments.trl else None
        results = measure_all(figures, session, as_lines=arguments.json)
    if not arguments.json:
        print(f"{session.dtype}, 64 sequences of {session.ratio_tokens} tokens on average (beside TRL "
              f"{session.tokens}), a thread a process\n")
        print(table(results))
    print(f"{time.monotonic() - started:5.0f} s in all", file=sys.stderr)
    return int(any(isinstance(result, Failed) for result in results))


if __name__ == "__main__":
    sys.exit(main())
