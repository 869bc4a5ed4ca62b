"""The folder of a run, and what is written into it while it runs.

Takes:  the config, a step's metrics, samples, an evaluation's answers.
Gives:  config.yaml, metrics.jsonl, samples.jsonl, eval.jsonl, run.log, logs/, checkpoints/, model/; beside them lies
        rollouts/, which the rollout workers write.
Knows:  a run that is resumed goes on in the same files: lines of steps that will come again are taken out.
Never:  holds a line back: whoever follows the files sees each step as it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux_ray.accounts import LEDGER, Account, as_line
from flux_ray.config import Config, to_yaml
from flux_ray.errors import UserError
from flux_ray.observability import rollouts
from flux_ray.run_dir import CONFIG, hidden, run_of

METRICS, SAMPLES, EVAL, LOG = "metrics.jsonl", "samples.jsonl", "eval.jsonl", "run.log"
TRACES = "traces"  # a step's time line as Chrome trace events
EVAL_SAMPLES = "eval_samples.jsonl"  # all of an evaluation on its own
REFERENCE = "reference.jsonl"  # the reference's log-probs of preference pairs


class RunFolder:
    """`path` with everything of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def create(self, config: Config, *, resume_step: int | None) -> None:
        """Make the folder and write the config. UserError for a folder that holds another run already.

        A run that goes on from another one's checkpoint is another run: only one that goes on in its own folder may
        find it in use.
        """
        goes_on = resume_step is not None and config.resume and run_of(config.resume).resolve() == self.path
        if not goes_on and (self.path / METRICS).exists():
            raise UserError(
                f"run_dir={self.path} holds a run already: choose another folder, or go on with resume={self.path}"
            )
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            _replace(self.path / CONFIG, to_yaml(hidden(config)))
        except OSError as error:
            raise UserError(f"run_dir={self.path}: can't be written to: {error.strerror}") from error
        if resume_step is not None:
            self.cut(resume_step)
        if (self.path / REFERENCE).exists():
            _rewrite(self.path / REFERENCE, read_lines(self.path / REFERENCE))  # what broke off is not to be added to

    def cut(self, step: int) -> None:
        """Keep what was known when `step` steps were done: the later ones are done again."""
        for name in (METRICS, SAMPLES, LEDGER, EVAL):
            if (self.path / name).exists():
                _keep_steps(self.path / name, step, inclusive=name == EVAL and step > 0)
        rollouts.cut(self.path, step)

    def open_ledger(self, step: int, account: Account) -> None:
        """The line that the accounts begin with, where the file has none yet: `step` steps are done."""
        if not any("next_uid" in line for line in read_lines(self.path / LEDGER)):
            self.append(LEDGER, as_line(step - 1, account))

    def account(self, step: int, account: Account) -> None:
        self.append(LEDGER, as_line(step, account))

    def end_ledger(self, how: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
            self.append(LEDGER, {"step": -1, "ended": how})

    def sync(self) -> None:
        """What has been written is on the disk."""
        for name in (METRICS, SAMPLES, LEDGER, EVAL):
            if (self.path / name).exists():
                with (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())

    def append(self, name: str, record: Mapping[str, object]) -> None:
        """One JSON object as one line; what JSON has no number for (nan, inf) becomes null."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")

    def write(self, name: str, records: Iterable[Mapping[str, object]]) -> None:
        """A file of JSON objects, a line each, in the place of what was there."""
        _rewrite(self.path / name, map(_plain_record, records))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.append(METRICS, {"step": step, **values})

    def evaluated(self, version: int) -> dict[str, float] | None:
        """What the evaluation at this version gave, if there was one."""
        for record in read_lines(self.path / EVAL):
            if record["step"] == version:
                return {name: value for name, value in record.items() if isinstance(value, float)}
        return None

    def trace(self, step: int, trace: Mapping[str, object]) -> None:
        folder = self.path / TRACES
        folder.mkdir(exist_ok=True)
        _replace(folder / f"step-{step:06d}.json", json.dumps(trace))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file of ours; none where there is no file.

    A last line that broke off, as a killed run leaves it, is left out. UserError for any other broken line.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{file} line {number}: broken JSON: {error.msg} at column {error.colno}") from error
    return records


def _keep_steps(file: Path, step: int, *, inclusive: bool) -> None:
    """Keep what was known when `step` steps were done: metrics of steps before it, the evaluation at it."""
    kept = [record for record in read_lines(file) if record["step"] < step + (1 if inclusive else 0)]
    _rewrite(file, kept)


def _rewrite(file: Path, records: Iterable[Mapping[str, object]]) -> None:
    _replace(file, "".join(json.dumps(record) + "\n" for record in records))


def _replace(file: Path, text: str) -> None:
    """The file has this text, or is as it was: whoever is killed meanwhile leaves no half."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _plain_record(record: Mapping[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
