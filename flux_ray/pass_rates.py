"""How often each prompt was answered right: `flux-ray passrates`, for a curriculum.

Takes:  folders of runs or of evaluations, with the samples in them; the data, as the first one's options read them.
Gives:  `Tally`: prompt ► samples, and those that were right; `write_rated`: the rows with their rates; the command.
Knows:  a row is known by its prompt's text, so rows may have moved since; rows of one prompt share a rate.
Never:  gives a rate to a row that nobody has sampled: it is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_ray import config as configs
from flux_ray import names, run_dir
from flux_ray.config import PolicyGradientConfig
from flux_ray.data.encode import are_pairs, asked
from flux_ray.data.forms import parsed, shaped
from flux_ray.data.memory import write_rows
from flux_ray.data.rows import BadCell, Row, Rows
from flux_ray.data.sets import DataSet, train_sets
from flux_ray.data.sources import load_rows
from flux_ray.errors import UserError
from flux_ray.models_of_runs import OF_TRAINING
from flux_ray.models_of_runs import parsed as options_of
from flux_ray.observability import rollouts
from flux_ray.observability.eval_metrics import CLOSE
from flux_ray.observability.run_folder import EVAL_SAMPLES, read_lines

EVALUATION = "evaluation"  # folder that an evaluation on its own has under its run_dir
ENDING = ".jsonl"
USAGE = """\
flux-ray passrates RUN [RUN ...] -o OUT.jsonl [data=FILE] [OPTION=VALUE ...]

  flux-ray passrates runs/first -o rated.jsonl
  flux-ray passrates runs/first runs/second -o rated.jsonl data=train.jsonl eval.pass_reward=0.5

writes the rows of the data with a column pass_rate: the share of samples that were right, of all that these runs (or
evaluations) have kept of the row's prompt. data.curriculum orders by it.

  RUN                the folder of a run, or of flux-ray eval. The first one's options say how data are read
  data               what to rate; none: data.train. Several sets: a file for each, OUT-NAME.jsonl
  eval.pass_reward   the task reward from which on a sample is right
"""


@dataclass
class Tally:
    """Samples by their prompts' texts.

    >>> tally = Tally(pass_reward=1.0)
    >>> for reward in (1.0, 0.0, None, 1.0):
    ...     tally.add("1+1=", reward)
    >>> round(tally.rate("1+1="), 3), tally.rate("2+2="), tally.num_samples
    (0.667, None, 3)
    """

    pass_reward: float  # task reward from which on a sample is right
    num_samples: int = 0
    of_prompt: dict[str, list[int]] = field(default_factory=dict)  # key ► samples, and right ones

    def add(self, prompt: object, reward: float | None) -> None:
        """One sample; without a reward it counts for nothing."""
        if reward is None:
            return
        counts = self.of_prompt.setdefault(_key(prompt), [0, 0])
        counts[0] += 1
        counts[1] += reward >= self.pass_reward - CLOSE
        self.num_samples += 1

    def add_run(self, run: Path) -> None:
        """Every sample that a run, or an evaluation, has kept. UserError where there is none."""
        before = self.num_samples
        for step in rollouts.steps(run):
            table = rollouts.read(run, step, ["prompt", "task_reward"])
            for prompt, reward in zip(table["prompt"].to_pylist(), table["task_reward"].to_pylist(), strict=True):
                self.add(prompt, reward)
        for folder in (run, run / EVALUATION):
            for line in read_lines(folder / EVAL_SAMPLES):
                for reward in line["task_rewards"]:
                    self.add(line["prompt"], reward)
        if self.num_samples == before:
            raise UserError(f"{run}: neither rollouts with rewards nor samples of an evaluation in it "
                            "(observability.rollouts_max_gib=0 keeps none)")

    def rate(self, prompt: object) -> float | None:
        num_samples, num_right = self.of_prompt.get(_key(prompt), (0, 0))
        return num_right / num_samples if num_samples else None


@dataclass(frozen=True)
class Rated:
    """A file of rows with their rates."""

    file: Path
    rates: list[float | None]

    def __str__(self) -> str:
        known = [rate for rate in self.rates if rate is not None]
        mean = sum(known) / len(known)
        return (f"{self.file}: {len(known)} of {len(self.rates)} rows have a pass rate, {mean:.3g} in the mean; "
                f"{known.count(1.0)} are always right, {known.count(0.0)} never")


def _key(prompt: object) -> str:
    """A prompt's text; of a chat its JSON, in which rollouts hold it as text."""
    found = parsed(prompt)
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, sort_keys=True)


def write_rated(config: PolicyGradientConfig, tally: Tally, out: Path) -> Iterator[Rated]:
    """The rows of each set of `data.train`, with their rates, into `out`; of several sets into OUT-NAME.

    UserError where no row of a set has a rate.
    """
    for one in train_sets(config):
        data = one.config.data
        rows = load_rows(one.source, split=data.split, max_rows=data.max_rows, column=data.prompt_column,
                         on_bad_row=data.on_bad_row)
        rates = _rates(one, rows, tally)
        file = out.with_name(f"{out.stem}-{one.name}{out.suffix}") if one.name else out
        unfinished = file.with_name(f".{file.name}.writing")
        try:
            write_rows(({**row, data.pass_rate_column: rate} for row, rate in zip(rows.rows, rates, strict=True)),
                       unfinished, column=data.prompt_column, split=data.split)
            os.replace(unfinished, file)
        except OSError as error:
            raise UserError(f"-o {file}: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        yield Rated(file, rates)


def _rates(one: DataSet[PolicyGradientConfig], rows: Rows, tally: Tally) -> list[float | None]:
    data = one.config.data
    read = shaped(rows, data)
    pairs = are_pairs(read, data)
    if not pairs:
        read.require(data.prompt_column, "data.prompt_column")

    def rate(row: Row) -> float | None:
        try:
            return tally.rate(asked(row, data, pairs=pairs)[0])
        except BadCell:
            return None  # nobody has been asked it: the run that reads the file says what is wrong with it

    rates = [rate(row) for row in read.rows]
    if not any(rate is not None for rate in rates):
        raise UserError(f"{rows.source}: no prompt in it is one that was sampled: data.prompt_column, data.as_chat, "
                        "data.system_prompt and data.prompt_template must be as they were")
    return rates


def config_of(runs: Sequence[Path], options: Mapping[str, Any]) -> PolicyGradientConfig:
    """The first run's config with these options. UserError for a run that samples nothing."""
    keys = [key for key, _ in configs.options()]
    folder = next((one for one in (runs[0], runs[0] / EVALUATION) if run_dir.is_begun(str(one))), runs[0])
    saved = run_dir.saved_config(str(folder), named="")
    before = names.flatten({name: value for name, value in saved.items() if name not in OF_TRAINING}, options=keys)
    config = configs.from_dict(names.flatten(dict(options), options=keys), before=before)
    if not isinstance(config, PolicyGradientConfig):
        raise UserError(f"{runs[0]}: algo.name={config.algo.name} samples nothing, so there is nothing to rate by")
    return config


def command(arguments: Sequence[str]) -> None:
    """`flux-ray passrates ...`."""
    words = list(arguments)
    if not words or {"-h", "--help"} & set(words):
        return print(USAGE, end="")
    out = _out(words)
    runs = [Path(word).expanduser().absolute() for word in words if _is_run(word)]
    if not runs:
        raise UserError("flux-ray passrates RUN [RUN ...] -o OUT.jsonl: the folder of a run is missing")
    options = options_of([word for word in words if not _is_run(word)])
    data = options.pop("data", None)
    config = config_of(runs, options if data is None else {**options, "data.train": data})
    tally = Tally(config.eval.pass_reward)
    for run in runs:
        tally.add_run(run)
    print(f"{tally.num_samples} samples of {len(tally.of_prompt)} prompts, right from a task reward of "
          f"{tally.pass_reward:g} on")
    for rated in write_rated(config, tally, out):
        print(rated)


def _is_run(word: str) -> bool:
    return "=" not in word or Path(word).expanduser().is_dir()


def _out(words: list[str]) -> Path:
    """The file after -o, which leaves the words."""
    place = next((i for i, word in enumerate(words) if word in ("-o", "--out")), len(words))
    if place + 1 >= len(words):
        raise UserError(f"flux-ray passrates RUN -o OUT{ENDING}: -o names the file that the rows go to")
    out = Path(words[place + 1]).expanduser()
    del words[place : place + 2]
    if out.suffix != ENDING:
        raise UserError(f"-o {out}: rows are written as JSON, a line each: name a file that ends in {ENDING}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.absolute().parent}")
    return out
