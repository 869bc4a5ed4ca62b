"""`flux-ray audit RUN`: proves that no prompt of a run was lost and none trained on twice.

Takes:  a run's folder, of any age, of a run that goes on, has ended or was killed.
Gives:  `audit`, the sum; `told`, its lines for people.
Knows:  the accounts in ledger.jsonl must agree with metrics.jsonl, a line a step, and with each checkpoint's state.
Never:  changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_ray import run_dir
from flux_ray.accounts import LEDGER, Audit, audited, uids_of
from flux_ray.errors import CheckFailed, UserError
from flux_ray.observability.run_folder import METRICS, read_lines
from flux_ray.run import checkpoint as saved

SHOWN = 10  # uids of those that are lost, or were trained on twice


def audit(folder: str | Path) -> Audit:
    """Of the run in that folder. UserError where there is none, or where it is from before there were ledgers."""
    path = Path(folder).expanduser().absolute()
    if not (path / run_dir.CONFIG).is_file():
        raise UserError(f"{path} is no run's folder: there is no {run_dir.CONFIG} in it")
    metrics = [int(line["step"]) for line in read_lines(path / METRICS)]
    if not (path / LEDGER).is_file():
        raise UserError(f"{path}: an older version made this run and kept no {LEDGER}, so what became of its prompts "
                        f"isn't known; {METRICS} has {len(metrics)} steps{_gap(metrics)}")
    lines = read_lines(path / LEDGER)
    sums = audited(lines)
    # A step's account is written before its metrics: a run that goes on, or was killed, may lack the last one.
    known = list(range(sums.first_step, sums.num_steps))
    if metrics not in (known, known[:-1]):
        sums.faults.append(f"{METRICS} has steps that {LEDGER} hasn't, or the other way round{_gap(metrics)}")
    sums.faults += _of_checkpoints(path, {int(line["step"]): line for line in lines if "next_uid" in line})
    if sums.ended is None:
        sums.ended = "goes on" if run_dir.is_held(path) else "was killed"
    return sums


def _gap(steps: list[int]) -> str:
    missing = [step for step in range(steps[0], steps[-1] + 1) if step not in set(steps)] if steps else []
    return f" (missing: {missing[:SHOWN]})" if missing else ""


def _of_checkpoints(path: Path, lines: dict[int, dict[str, list[list[int]]]]) -> Iterator[str]:
    """Each checkpoint would go on where the accounts say that it stands."""
    for folder in saved.whole(path / "checkpoints"):
        state = saved.load(folder)
        line = lines.get(state.step - 1)
        if line is None:
            yield f"{folder.name}: {LEDGER} has no line of its step"
        elif set(uids_of(line["pending"])) != set(state.unfinished) or line["next_uid"] != state.next_uid:
            yield f"{folder.name} would start other prompts again than are pending in {LEDGER}"


def told(sums: Audit) -> Iterator[tuple[str, str]]:
    """Headings and their texts."""
    steps = f"{sums.num_steps - sums.first_step} of them" if sums.first_step else "all of them"
    yield "steps", f"{sums.num_steps} done, {steps} in {LEDGER}; the run {_ENDED.get(str(sums.ended), sums.ended)}"
    yield "drawn", f"{sums.drawn} prompts"
    yield "trained", str(sums.trained)
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(sums.dropped.items()) if count)
    yield "dropped", f"{sums.dropped.total()}{f': {causes}' if causes else ''}"
    yield "pending", str(sums.pending)
    yield "lost", f"{len(sums.lost)}{_some(sums.lost)}"
    yield "twice", f"{len(sums.twice)}{_some(sums.twice)}"
    for fault in sums.faults:
        yield "fault", fault
    yield "verdict", "clean" if sums.is_clean else "not clean"


_ENDED = {"done": "is done", "failed": "failed", "interrupted": "was interrupted"}


def _some(uids: list[int]) -> str:
    return f": uid {', '.join(map(str, uids[:SHOWN]))}{' …' if len(uids) > SHOWN else ''}" if uids else ""


def command(arguments: Sequence[str]) -> None:
    """`flux-ray audit RUN`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("flux-ray audit RUN: the folder of a run")
    sums = audit(arguments[0])
    for heading, text in told(sums):
        print(f"{heading:<12} {text}")
    if not sums.is_clean:
        raise CheckFailed(f"{arguments[0]}: the accounts are not clean")
