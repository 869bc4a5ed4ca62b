"""What a GPU shows, unattended, in one JSON: the whole loop on a .5B model, its parts, and what they take.

    python -m benchmarks.gpu [--out FILE.json] [--minutes 9] [--only SECTION,SECTION]
    python -m benchmarks.gpu --device cpu --tiny     # the same way through with a tiny model: no figures to report

Gives:  the file, written anew after each section: machine, versions, and of each section its config and figures, or why
        it was cut, failed or skipped. What the figures mean: docs/benchmarks.md.
Knows:  each section is a process of its own with a deadline: one that hangs costs its share of the time and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import significant
from benchmarks.gpu_parts import BARE, SO_FAR
from benchmarks.gpu_work import HALF_BILLION, TINY
from benchmarks.parts import run_part
from flux_ray.errors import UserError, unknown

DONE, CUT, FAILED, SKIPPED, WAITING, INTERRUPTED = "done", "cut", "failed", "skipped", "waiting", "interrupted"
MACHINE, MODEL = "machine", "model"
LAST_S = 5.0  # of the time: to end what runs, and to write
OUTPUT_LINES = 30  # kept of what a section printed, where it broke
LORA_RANK = 16
LOOK_EVERY_S = 1.0  # at the GPU's memory
#: vLLM computes in a process of its own, as it does where nobody tells it otherwise.
GPU_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

Report = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """`share`: of the time that it and the later ones have left, in proportion to theirs; with less than `least_s`
    seconds it is skipped. `asked`: the part's arguments."""

    name: str
    meaning: str
    part: str
    share: float
    least_s: float
    asked: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """`config` and `figures`: what there is, in whatever state."""

    state: str
    reason: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    peak_gpu_mib: int | None = None
    output: list[str] = field(default_factory=list)


def sections(*, device: str, tiny: bool) -> list[Section]:
    """In the order of their worth: time may end before the last."""
    size, cpu = asdict(TINY if tiny else HALF_BILLION), device == "cpu"
    rows = {name: {"model.layout": name} for name in ("block_diagonal" if cpu else "varlen", "padded")}
    publishing = {"gloo": 90.0} if cpu else {"ipc": 90.0, "gloo": 45.0}

    def of_model(name: str, meaning: str, part: str, share: float, least_s: float, **asked: Any) -> Section:
        return Section(name, meaning, part, share, least_s, {"device": device, "size": size, **asked}, needs=(MODEL,))

    first, *others = [
        of_model(f"publish_{backend}", f"new weights to an engine that samples, by {backend}", "gpu_publish", share, 15,
                 backend=backend, steps=6 if tiny else 8)
        for backend, share in publishing.items()]
    return [
        Section(MACHINE, "the machine, its libraries, what it multiplies", "gpu_machine", 45, 5, {"device": device}),
        Section(MODEL, "random weights on disk", "gpu_model", 60, 5, {"device": device, "size": size}),
        of_model("synchronous", "the whole loop, synchronous", "gpu_loop", 180, 20, tiny=tiny, staleness=0),
        of_model("asynchronous", "the whole loop, max_staleness=1", "gpu_loop", 150, 20, tiny=tiny, staleness=1),
        first,
        of_model("packed_rows", "a training step: packed rows, padded ones, transformers alone", "gpu_train", 75, 10,
                 variants=rows if cpu else rows | {BARE: {}}),
        of_model("lora", "a training step with LoRA, and with all weights", "gpu_train", 40, 10,
                 variants={f"rank_{LORA_RANK}": {"train.lora.rank": LORA_RANK}, "all_weights": {}}),
        of_model("head", "log-probs and entropy alone", "gpu_head", 20, 5),
        *others,
    ]


def chosen(every: Sequence[Section], only: str | None) -> list[Section]:
    """Those named, with what they need. UserError for a name that isn't there."""
    if only is None:
        return list(every)
    names = {name.strip() for name in only.split(",")}
    for name in names:
        if name not in {section.name for section in every}:
            raise unknown("--only", name, [section.name for section in every])
    needed = {MACHINE, *(name for section in every if section.name in names for name in section.needs)}
    return [section for section in every if section.name in names | needed]


def allotted_s(planned: Sequence[Section], at: int, left_s: float) -> float:
    """Seconds for section `at`: its share of what is left. What earlier ones had no need of is thereby passed on."""
    return left_s * planned[at].share / sum(section.share for section in planned[at:])


def run_all(report: Report, planned: Sequence[Section], *, ends_s: float, run: Callable[[Section, float], Outcome],
            write: Callable[[Report], None], now_s: Callable[[], float] = time.monotonic) -> None:
    """Each section after the other, its result entered in the report, which is written before and after each.

    `run` gets a section and its deadline in seconds; `ends_s`: when the whole has to be over, on `now_s`'s clock.
    """
    entries = report["sections"] = {
        section.name: {"meaning": section.meaning, "state": WAITING} for section in planned}
    write(report)
    for at, section in enumerate(planned):
        entry, started_s = entries[section.name], now_s()
        deadline_s = allotted_s(planned, at, ends_s - started_s)
        missing = [name for name in section.needs if entries[name]["state"] != DONE]
        if missing:
            outcome = Outcome(SKIPPED, f"it needs {', '.join(missing)}, which is not there")
        elif deadline_s < section.least_s:
            outcome = Outcome(SKIPPED, f"its share of the time is {deadline_s:.0f} s, and it needs {section.least_s:g}")
        else:
            entry["state"] = INTERRUPTED  # what stands there unless it comes to its end
            write(report)
            outcome = run(section, deadline_s)
        entry |= {name: value for name, value in asdict(outcome).items() if value not in (None, [], {})}
        entry |= {"seconds": round(now_s() - started_s, 1), "allotted_s": round(deadline_s, 1)}
        report["summary"] = summary(entries)
        write(report)


def summary(entries: dict[str, Any]) -> dict[str, float]:
    """The figures that one looks for first, of what there is."""
    figures = {name: entry.get("figures", {}) for name, entry in entries.items()}
    synchronous, asynchronous, rows, lora = (
        figures.get(name, {}) for name in ("synchronous", "asynchronous", "packed_rows", "lora"))
    product = figures.get(MACHINE, {}).get("product_tflops")
    found: dict[str, float] = {}
    for name, of in (("synchronous", synchronous), ("asynchronous", asynchronous)):
        found |= {f"{name}_{key}": of[key] for key in ("step_s", "tokens_per_s", "generation_share", "trainer_peak_gib")
                  if key in of}
    trained = {"synchronous": synchronous, **{name: of for name, of in rows.items() if isinstance(of, dict)}}
    if product:
        found |= {f"{name}_mfu": of["train_tflops"] / product for name, of in trained.items() if "train_tflops" in of}
    _ratio(found, "asynchronous_gain", synchronous.get("step_s"), asynchronous.get("step_s"))
    packed = rows.get("varlen", rows.get("block_diagonal", {}))
    _ratio(found, "packed_gain", rows.get("padded", {}).get("step_s"), packed.get("step_s"))
    _ratio(found, "of_transformers_alone", packed.get("step_s"), rows.get(BARE, {}).get("step_s"))
    adapted, whole = lora.get(f"rank_{LORA_RANK}", {}), lora.get("all_weights", {})
    for key in ("step_s", "peak_gib"):
        _ratio(found, f"lora_{key}_of_all_weights", adapted.get(key), whole.get(key))
    for name, of in figures.items():
        if name.startswith("publish_"):
            found |= {f"{name}_{key}": of[key] for key in ("gb_per_s", "served_s", "stalled_s") if key in of}
    return found


def _ratio(found: dict[str, float], name: str, a: float | None, b: float | None) -> None:
    if a is not None and b:
        found[name] = a / b


def rounded(value: Any) -> Any:
    """Floats to four digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(of) for of in value]
    return significant(value) if isinstance(value, float) else value


def write_to(file: Path) -> Callable[[Report], None]:
    """Writes a report in one piece: who reads it meanwhile sees the one before."""
    def write(report: Report) -> None:
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(rounded(report), indent=1) + "\n")
        os.replace(new, file)

    return write


class MemoryWatch:
    """The most memory that any GPU of this machine had in use, all processes together, by nvidia-smi; `peak_mib` is
    None without one."""

    def __init__(self) -> None:
        self.peak_mib: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join(timeout=2 * LOOK_EVERY_S)

    def _look(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._over.wait(LOOK_EVERY_S):
            try:
                shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
                self.peak_mib = max(self.peak_mib or 0, *map(int, shown.split()))
            except (OSError, ValueError, subprocess.SubprocessError):
                return


def run_section(section: Section, deadline_s: float, *, folder: Path, device: str) -> Outcome:
    """In a process of its own. What it had when it broke, or was ended, is kept."""
    work = Path(tempfile.mkdtemp(prefix=f"{section.name}-", dir=folder))
    print(f"{section.name}: {section.meaning} (at most {deadline_s:.0f} s)", file=sys.stderr, flush=True)
    reason, output = None, []
    with MemoryWatch() as memory:
        try:
            part = run_part(section.part, folder, deadline_s=deadline_s, work=work,
                            env=GPU_ENV if device == "cuda" else None, **section.asked)
        except RuntimeError as error:
            kept = work / SO_FAR
            part, reason = json.loads(kept.read_text()) if kept.exists() else {}, str(error)
            output = (work / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-OUTPUT_LINES:]
            print(f"{section.name}: {reason}", file=sys.stderr, flush=True)
    figures = part.get("figures", {})
    state = DONE if reason is None else CUT if figures else FAILED
    return Outcome(state, reason, part.get("config", section.asked), figures, memory.peak_mib, output)


def why_not(device: str, *, tiny: bool) -> str | None:
    """What is missing here, in one line; None where it can run."""
    import torch

    if device == "cpu":
        return None if tiny else "--device cpu needs --tiny: a .5B model is too much for a CPU in minutes"
    return None if torch.cuda.is_available() else (
        "no GPU here: run it on a machine that has one, or try the way through with --device cpu --tiny")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: runs/gpu-DATE_TIME.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; default: 9")
    parser.add_argument("--only", metavar="SECTION,SECTION", help="some of the sections, with what they need")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    asked = parser.parse_args(argv)
    try:
        planned = chosen(sections(device=asked.device, tiny=asked.tiny), asked.only)
        missing = why_not(asked.device, tiny=asked.tiny)
        if missing:
            raise UserError(missing)
        if asked.minutes <= 0:
            raise UserError(f"--minutes {asked.minutes:g}: more than 0")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    file = (asked.out or Path("runs", f"gpu-{time.strftime('%Y-%m-%d_%H-%M-%S')}.json")).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended with us
    report: Report = {"benchmark": "gpu", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                              "minutes": asked.minutes, "device": asked.device, "tiny": asked.tiny}
    ends_s = time.monotonic() + 60 * asked.minutes - LAST_S
    with tempfile.TemporaryDirectory(prefix="flux-ray-gpu-") as folder:
        try:
            run_all(report, planned, ends_s=ends_s, write=write_to(file),
                    run=lambda section, deadline_s: run_section(section, deadline_s, folder=Path(folder),
                                                                device=asked.device))
        except KeyboardInterrupt:
            print(f"interrupted; what there is: {file}", file=sys.stderr)
            return 130
    print(json.dumps(rounded(report["summary"]), indent=1))
    print(file)
    return int(any(entry["state"] in (FAILED, CUT) for entry in report["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
