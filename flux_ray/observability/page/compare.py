"""`flux-ray compare A B`: two runs, paired where their prompts are the same.

Takes:  two runs' folders, whole or not.
Gives:  `compare`: tables, each with a heading and a remark; as text, or as an HTML file.
Knows:  a difference is B's less A's. An interval is over prompts: what sampling alone gives lies in it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flux_ray.errors import UserError
from flux_ray.observability.estimates import interval
from flux_ray.observability.page import html
from flux_ray.observability.page.figures import Points, first_of_tail, series, tail_mean
from flux_ray.observability.page.report import FIRST, as_text
from flux_ray.observability.page.runs import Run, differences, found_runs
from flux_ray.observability.page.table import table_of
from flux_ray.observability.run_folder import EVAL, METRICS

READ_AT_ONCE = 2_000  # rollouts whose prompts are in memory together


@dataclass(frozen=True)
class Part:
    heading: str
    remark: str = ""
    names: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


def command(arguments: Sequence[str]) -> None:
    """UserError where one of the folders is no run's, or the file can't be written."""
    parser = argparse.ArgumentParser(prog="flux-ray compare", description="Compares two runs: B's less A's.")
    parser.add_argument("runs", nargs=2, metavar="RUN", help="folders of runs, A and B")
    parser.add_argument("--html", metavar="FILE", help="write it there, with the curves")
    asked = parser.parse_args(list(arguments))
    runs, wrong = found_runs(asked.runs)
    if wrong:
        raise UserError("; ".join(wrong))
    if len(runs) < 2:
        raise UserError(f"flux-ray compare A B: both are {runs[0].path}")
    parts = list(compare(*runs))
    for part in parts:
        print("\n".join(as_lines(part)), end="\n\n")
    if asked.html:
        _write(Path(asked.html).expanduser(), runs, parts)


def compare(a: Run, b: Run) -> Iterator[Part]:
    """Notes, options, metrics, evaluations, rollouts: what there is of them."""
    for run in (a, b):
        for note in run.notes():
            yield Part(run.name, note)
    options = [run.options() for run in (a, b)]
    keys = differences(options)
    yield Part("options that differ", "" if keys else "none", ("option", a.name, b.name),
               [(key, *(_value(of, key) for of in options)) for key in keys])
    yield from _metrics(a, b)
    yield from _evaluations(a, b)
    yield _paired("answers of the last evaluation", "the first prompts that each evaluation writes down",
                  _answers(a), _answers(b))
    yield _rollouts(a, b)


def _value(options: Mapping[str, object], key: str) -> str:
    return as_text(options[key]) if key in options else "–"


def _metrics(a: Run, b: Run) -> Iterator[Part]:
    of_a, of_b = (series(run.lines(METRICS).records) for run in (a, b))
    names = [name for name in FIRST if name in of_a or name in of_b]
    names += sorted((of_a.keys() | of_b.keys()) - set(names))
    rows = []
    for name in names:
        ends = [_ends(points.get(name)) for points in (of_a, of_b)]
        rows.append((name, ends[0][0], ends[1][0], ends[0][1], ends[1][1], _less(ends[1][1], ends[0][1])))
    yield Part("metrics", "" if rows else "neither run has any",
               ("metric", "last, A", "last, B", "last tenth, A", "last tenth, B", "B less A"), rows)


def _ends(points: Points | None) -> tuple[float | None, float | None]:
    return (points[-1][1], tail_mean(points)) if points else (None, None)


def _less(b: float | None, a: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _evaluations(a: Run, b: Run) -> Iterator[Part]:
    of_a, of_b = (series(run.lines(EVAL).records) for run in (a, b))
    names = sorted(of_a.keys() | of_b.keys())
    rows = []
    for name in names:
        last = [points[name][-1] if name in points else (None, None) for points in (of_a, of_b)]
        rows.append((name, last[0][0], last[0][1], last[1][0], last[1][1], _less(last[1][1], last[0][1])))
    if rows:
        yield Part("last evaluations", "", ("metric", "step, A", "A", "step, B", "B", "B less A"), rows)


def _answers(run: Run) -> dict[str, float]:
    """Prompt ► its mean reward in the last evaluation."""
    evaluations = [line["answers"] for line in run.lines(EVAL).records if isinstance(line.get("answers"), list)]
    rewards: dict[str, list[float]] = defaultdict(list)
    for answer in evaluations[-1] if evaluations else []:
        if isinstance(answer.get("reward"), (int, float)):
            rewards[as_text(answer.get("prompt"))].append(float(answer["reward"]))
    return {prompt: float(np.mean(values)) for prompt, values in rewards.items()}


def _rollouts(a: Run, b: Run) -> Part:
    """Of the last tenth of each run's steps; of all where no prompt is in both ends."""
    remark = "the last tenth of each run's steps"
    ends = [_of_rollouts(run, tail=True) for run in (a, b)]
    if all(ends) and not ends[0].keys() & ends[1].keys():
        remark = "all steps: no prompt is in the last tenth of both"
        ends = [_of_rollouts(run, tail=False) for run in (a, b)]
    return _paired("rollouts: mean task reward of a prompt", remark, *ends)


def _of_rollouts(run: Run, *, tail: bool) -> dict[str, float]:
    """Prompt ► the mean task reward of its samples, dropped groups among them; the reward where no task's is known."""
    table = table_of(run)
    index = table.columns(("step", "reward", "task_reward"))
    steps, task = index["step"].astype(float), index["task_reward"].astype(float)
    rewards = np.where(np.isnan(task), index["reward"].astype(float), task)
    rows = np.flatnonzero(~np.isnan(rewards))
    if tail and len(rows):
        rows = rows[steps[rows] >= first_of_tail(np.nanmax(steps), np.nanmin(steps))]
    sums: dict[str, tuple[float, int]] = {}
    for first in range(0, len(rows), READ_AT_ONCE):
        part = rows[first:first + READ_AT_ONCE]
        for row in table.read(part, ("prompt", "reward", "task_reward")):
            reward = row.get("task_reward")
            reward = row.get("reward") if reward is None else reward
            total, count = sums.get(str(row.get("prompt")), (0.0, 0))
            if reward is not None:
                sums[str(row.get("prompt"))] = (total + reward, count + 1)
    return {prompt: total / count for prompt, (total, count) in sums.items()}


def _paired(heading: str, remark: str, of_a: Mapping[str, float], of_b: Mapping[str, float]) -> Part:
    """The mean over the prompts that both have, and the interval of its difference."""
    both = sorted(of_a.keys() & of_b.keys())
    if not both:
        why = "neither run has any" if not of_a and not of_b else \
              f"A has {len(of_a)} prompts, B {len(of_b)}, and none is in both"
        return Part(heading, why)
    a, b = (np.array([of[prompt] for prompt in both]) for of in (of_a, of_b))
    low, high = interval(b - a)
    row = (len(both), a.mean(), b.mean(), (b - a).mean(), f"{low:.4g} to {high:.4g}",
           f"{(b > a).sum()} / {(b == a).sum()} / {(b < a).sum()}")
    names = ("prompts in both", "A", "B", "B less A", "95 % interval", "better / same / worse")
    return Part(heading, remark, names, [row])


def as_lines(part: Part) -> Iterator[str]:
    """As a terminal shows it: columns under each other, numbers to the right."""
    yield f"{part.heading}: {part.remark}" if part.remark else part.heading
    if not part.rows:
        return
    texts = [[html.shown(value) for value in row] for row in (part.names, *part.rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(part.names))]
    for row in texts:
        yield "  " + "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in
                                                          zip(row[1:], widths[1:], strict=True))])


def _write(file: Path, runs: Sequence[Run], parts: Sequence[Part]) -> None:
    of_runs = [series(run.lines(METRICS).records) for run in runs]
    shown = [part for p in parts for part in (
        html.heading(p.heading), html.paragraph(p.remark) if p.remark else "",
        html.table(p.names, p.rows) if p.rows else "")]
    names = [name for name in FIRST if any(name in of for of in of_runs)]
    drawn = [html.curve(name, [of.get(name, []) for of in of_runs]) for name in names]
    legend = f"A, blue: {runs[0].path}. B, orange: {runs[1].path}."
    text = html.page(f"{runs[0].name} and {runs[1].name}", [html.paragraph(legend), html.curves(drawn), *shown])
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: can't be written: {error.strerror}") from None
    print(file)
