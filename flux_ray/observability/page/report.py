"""`flux-ray report RUN`: one HTML file that tells of a run, for who has nothing else of it.

Takes:  a run's folder, whole or not.
Gives:  `report`, the file's text; `write_report`, the file; `write_environment`, what the run had at hand.
Knows:  a run writes both at its end: a report made later, on another machine, still tells of the run's own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from flux_ray import config as configs
from flux_ray import info
from flux_ray.errors import UserError
from flux_ray.observability.eval_metrics import HIGH, LOW
from flux_ray.observability.page import html
from flux_ray.observability.page.figures import cost, series, tail_mean
from flux_ray.observability.page.runs import ENDED, Record, Run, found_runs
from flux_ray.observability.run_folder import EVAL, METRICS, SAMPLES

REPORT, ENVIRONMENT = "report.html", "environment.json"
#: Curves that stand at the top; the others are folded.
FIRST = ("reward/task_mean", "reward/mean", "actor/loss", "actor/entropy", "actor/grpo_kl",
         "rollout/response_length_mean", "rollout/truncated_frac", "train/grad_norm", "rollout/tokens_per_s",
         "driver/step_s")
MOST_EVALUATIONS = 6
MOST_ANSWERS = 16


def command(arguments: Sequence[str]) -> None:
    """UserError where the folder is no run's, or the file can't be written."""
    parser = argparse.ArgumentParser(prog="flux-ray report", description="Writes one HTML file about a run.")
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"where to (default: RUN/{REPORT})")
    asked = parser.parse_args(list(arguments))
    (run,), _ = found_runs([asked.run])
    print(write_report(run, Path(asked.output).expanduser() if asked.output else run.path / REPORT))
    for note in run.notes():
        print(f"note: {note}")


def at_end(folder: Path, how: str, *, say: Callable[[str], None]) -> None:
    """The report of a run that ends, and how: nothing that goes wrong here is the run's failure, and all is told."""
    try:
        write_environment(folder)
        write_report(Run(folder, folder.name), folder / REPORT, state=ENDED[how])
    except Exception as error:
        say(f"warning: no report was written: {' '.join(str(error).split()) or type(error).__name__}")


def write_report(run: Run, file: Path, *, state: str | None = None) -> Path:
    """UserError where it can't be written. `state`: how the run stands, as its writer knows."""
    text = report(run, state or run.state)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: can't be written: {error.strerror}") from None
    return file


def write_environment(folder: Path) -> None:
    """Versions and devices of this machine, for the reports of the run."""
    text = json.dumps(dict(info.info(asks_gpus=False)), indent=1)
    (folder / ENVIRONMENT).write_text(text, encoding="utf-8")


def report(run: Run, state: str) -> str:
    """The whole file's text."""
    return html.page(f"{run.name}: the run {state}", _parts(run))


def _parts(run: Run) -> Iterator[str]:
    yield html.paragraph(str(run.path))
    yield from map(html.paragraph, run.notes())
    metrics, evaluations = series(run.lines(METRICS).records), run.lines(EVAL).records
    yield html.heading("Cost")
    yield html.table(("", ""), cost(metrics))
    if metrics:
        yield html.heading("Curves")
        yield html.curves(html.curve(name, [metrics[name]]) for name in FIRST if name in metrics)
        rest = sorted(set(metrics) - set(FIRST))
        if rest:
            yield html.folded(f"{len(rest)} others", html.curves(html.curve(name, [metrics[name]]) for name in rest))
        yield html.folded("their last values, and means over the last tenth of the steps", html.table(
            ("metric", "last", "mean of the last tenth"),
            [(name, points[-1][1], tail_mean(points)) for name, points in sorted(metrics.items())]))
    yield from _evaluations(evaluations)
    yield from _same_prompts(evaluations, run.lines(SAMPLES).records)
    yield from _config(run.options())
    yield html.heading("Environment")
    yield from _environment(run)


def _evaluations(evaluations: Sequence[Record]) -> Iterator[str]:
    """A line a metric, a column a step: evenly chosen ones, with the first and the last, where there are many."""
    found = {name.removeprefix("eval/"): dict(points) for name, points in series(evaluations).items()}
    steps = sorted({step for points in found.values() for step in points})
    if not steps:
        return
    chosen = [steps[round(i * (len(steps) - 1) / (MOST_EVALUATIONS - 1))] for i in range(MOST_EVALUATIONS)]
    shown_steps = steps if len(steps) <= MOST_EVALUATIONS else chosen
    yield html.heading("Evaluations")
    yield html.table(("", *(f"step {html.shown(step)}" for step in shown_steps)),
                     [(name, *(_with_interval(found, name, step) for step in shown_steps))
                      for name in found if not name.endswith((LOW, HIGH))])


def _with_interval(found: Mapping[str, Mapping[float, float]], name: str, step: float) -> object:
    low, high = (found.get(name + end, {}).get(step) for end in (LOW, HIGH))
    value = found[name].get(step)
    return value if low is None or high is None else f"{html.shown(value)} ({html.shown(low)} to {html.shown(high)})"


def _same_prompts(evaluations: Sequence[Record], samples: Sequence[Record]) -> Iterator[str]:
    """The first and last answers to the same prompts: of evaluations; without them, of what was sampled."""
    answered = [(line.get("step"), line["answers"]) for line in evaluations if isinstance(line.get("answers"), list)]
    if answered:
        first = {as_text(answer.get("prompt")): (answered[0][0], answer) for answer in answered[0][1]}
        last = {as_text(answer.get("prompt")): (answered[-1][0], answer) for answer in answered[-1][1]}
    else:
        seen = [(as_text(sample.get("prompt")), (sample.get("step"), sample)) for sample in samples]
        first, last = dict(reversed(seen)), dict(seen)
    rows = []
    for prompt, (step, answer) in first.items():
        later, other = last.get(prompt, (step, answer))
        if later != step:
            rows.append((prompt, step, as_text(answer.get("completion")), answer.get("reward"),
                         later, as_text(other.get("completion")), other.get("reward")))
    if rows:
        yield html.heading("The same prompts, first and last")
        yield html.table(("prompt", "step", "first", "reward", "step", "last", "reward"), rows[:MOST_ANSWERS])


def as_text(value: object) -> str:
    """A prompt or an answer: text, or messages as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _config(options: Mapping[str, object]) -> Iterator[str]:
    if not options:
        return
    defaults = {key: configs.default_of(field) for key, field in configs.options()}
    own = [(key, as_text(value)) for key, value in options.items() if key not in defaults or defaults[key] != value]
    yield html.heading("Config")
    yield html.table(("option that isn't at its default", "value"), own)
    yield html.folded("all options", html.table(
        ("option", "value"), [(key, as_text(value)) for key, value in options.items()]))


def _environment(run: Run) -> Iterator[str]:
    try:
        known = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
        yield html.table(("", ""), [(str(name), str(value)) for name, value in known.items()])
    except (OSError, ValueError, AttributeError):
        yield html.paragraph(f"not known: there is no {ENVIRONMENT}, which a run writes when it ends")
