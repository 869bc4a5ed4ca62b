"""What the command line says of itself.

Takes:  the options of the config, the files of conf/.
Gives:  `ABOUT`, `TRAIN`, `groups_help`, `options_help`: texts; `options_by_section`: what they and the site's page
        are made of; `paragraph`: a line as a terminal shows it.
Never:  writes a default or a meaning down: both are the config's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator

from flux_ray import config as configs

COLUMNS = 100   # widest line
BOUND_SIGNS = {"least": ">=", "above": ">", "most": "<="}

ABOUT = """\
flux-ray trains language models by reinforcement learning, with vLLM, DeepSpeed and Ray.

  flux-ray train OPTION=VALUE ...     trains a model
  flux-ray explain OPTION=VALUE ...   prints the objective of these options as formulas; starts nothing
  flux-ray train --help               lists every option with its default and its meaning
  flux-ray translate FILE             turns a configuration of verl, OpenRLHF or TRL into options
  flux-ray eval model=PATH data=FILE  evaluates a model, with intervals; --against BASE compares two
  flux-ray passrates RUN -o FILE      writes how often each prompt was answered right, for a curriculum
  flux-ray chat MODEL                 talks with a model in the terminal
  flux-ray generate MODEL FILE        writes responses to a file of prompts
  flux-ray checkpoint list RUN        shows a run's checkpoints; verify, export and prune do what they say
  flux-ray metrics                    tells what each metric is, and what to do when it is off
  flux-ray info                       shows versions, devices, and what is missing for what
  flux-ray view RUN ...               shows runs on a page: curves, rollouts, time lines; while they go on, too
  flux-ray report RUN                 writes one HTML file about a run
  flux-ray compare A B                compares two runs, paired where their prompts are the same
  flux-ray audit RUN                  proves that no prompt of a run was lost, none trained on twice
  flux-ray replay RUN --step N        computes a step's numbers again from its rollouts, by other options
  flux-ray --version

A first run:

  flux-ray train model.path=Qwen/Qwen3-0.6B data.train=data.jsonl 'reward.functions=[numeric]'

algo=NAME says how it learns: grpo (the default), dapo, ppo and others from rewards; dpo and reward_model from pairs;
sft from completions.
"""

TRAIN = """\
flux-ray train OPTION=VALUE ...

  flux-ray train model.path=PATH data.train=FILE.jsonl 'reward.functions=[numeric]'
  flux-ray train algo=dr_grpo model.path=PATH data.train=FILE.jsonl train.learning_rate=1e-6
  flux-ray train --multirun seed=0,1,2 model.path=PATH data.train=FILE.jsonl

  resume=RUN         goes on with that run and its options. Options beside it win. With a
                     GROUP=CHOICE beside it that run's options don't count: name them all anew
  resume=auto        goes on with what lies in run_dir, or begins there
  GROUP=CHOICE       takes a file of options, such as algo=dapo
  --config-dir DIR   adds your own files of options: experiment=mine is DIR/experiment/mine.yaml
  --multirun         runs once for each value of a list
  --config FILE      takes options from a YAML file. Options beside it win, and so do variables of
                     the environment: FLUX_SECTION_OPTION, as FLUX_TRAIN_LEARNING_RATE=1e-6
  --cfg job          prints the whole config and stops
  --hydra-help       lists what Hydra, which reads these words, can do besides
"""


def groups() -> dict[str, list[str]]:
    """The groups that conf/ has, with their choices."""
    folders = sorted(path for path in configs.CONF.iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def groups_help() -> str:
    lines = [_filled(f"{group}: {', '.join(choices)}", first="  ") for group, choices in groups().items()]
    return "\n".join(["Groups, and their choices:", *lines, ""])


def options_by_section() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each section with its options: (option, its default, what it means with its choices and bounds)."""
    for section, fields in itertools.groupby(configs.options(), key=lambda option: option[0].rpartition(".")[0]):
        yield section or "The run", [(key, _written(configs.default_of(f)), _meaning(key, f)) for key, f in fields]


def _written(default: object) -> str:
    """A value as the command line takes it."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _meaning(key: str, f: dataclasses.Field[object]) -> str:
    choices, bounds = " | ".join(f.metadata["choices"]), f.metadata["bounds"]
    limits = ", ".join(f"{sign} {bounds[bound]}" for bound, sign in BOUND_SIGNS.items() if bound in bounds)
    return f.metadata["help"] + _readers(key) + "".join(f" [{note}]" for note in (choices, limits) if note)


def _readers(key: str) -> str:
    """Who reads an option, where not all objectives do, and for whom it has another default or meaning."""
    alike: dict[tuple[str, str], list[str]] = {}
    for reader, f in configs.readers(key).items():
        alike.setdefault((_written(configs.default_of(f)), f.metadata["help"]), []).append(reader)
    (first, who), *others = alike.items()
    if not others and len(who) == len(configs.READERS):
        return ""
    parts = [", ".join(who)]
    for (default, meaning), readers in others:
        parts.append(f"{', '.join(readers)}: {default}" + (f", {meaning}" if meaning != first[1] else ""))
    return f" ({'; '.join(parts)})"


def options_help() -> str:
    lines = ["Options, and their defaults (null is none):"]
    for section, entries in options_by_section():
        lines.append(f"\n{section}:")
        for option, default, meaning in entries:
            lines += [f"  {option}={default}", _filled(meaning, first=" " * 6)]
    return "\n".join(lines)


def _filled(text: str, *, first: str) -> str:
    return textwrap.fill(text, COLUMNS, initial_indent=first, subsequent_indent=" " * 6)


def paragraph(text: str, *, indent: int) -> str:
    """For a person's eyes, wrapped to the terminal; what goes into a pipe or a file stays one line."""
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, subsequent_indent=" " * indent)
