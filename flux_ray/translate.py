"""A configuration of verl, OpenRLHF or TRL as flux_ray's options.

Takes:  the text of a file: a YAML or JSON tree, or a command line (a script with it), in any of the three's words.
Gives:  Translation: overrides of `flux-ray train`; for each option without a counterpart what there is instead.
Knows:  numbers that follow from several of theirs (updates of a step, prompts of a step, GPUs).
        What a file doesn't set is as their default has it, where that decides what is minimised; else as ours has it.
Never:  guesses: an option that no library has is named as such.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from flux_ray.config import open_options, options
from flux_ray.errors import UserError
from flux_ray.names import others
from flux_ray.names.counterpart import Missing
from flux_ray.names.words import hydra_value

LIBRARIES = {"verl": "verl", "openrlhf": "OpenRLHF", "trl": "TRL"}
ASSIGNMENT = re.compile(r"\+{0,2}(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
BRACED = re.compile(r"\$\{(\w+)\}(?!\w)")  # a shell's variable; Hydra would take it for an option of ours
FLAG = re.compile(r"--(?P<key>[A-Za-z_][\w.\-]*)(=(?P<value>.*))?", re.DOTALL)

Given = dict[str, object]  # their name ► value


@dataclass(frozen=True)
class Translation:
    library: str                     # a key of LIBRARIES
    overrides: tuple[str, ...]       # option=value, as the command line reads it
    without: tuple[tuple[str, str], ...]  # (their option, what there is instead)


def translate(file: Path) -> Translation:
    """UserError for a file that can't be read, or in which nothing is an option of one of the libraries."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    given = _read(text, file)
    library = _library(given)
    if library is None:
        raise UserError(f"{file}: no option of {', '.join(LIBRARIES.values())} in it; a YAML or JSON file, or a script "
                        "with a command line, can be translated")
    return _translated(given, library)


def _read(text: str, file: Path) -> Given:
    if file.suffix in (".yaml", ".yml", ".json"):
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{file}: {' '.join(str(error).split())}") from error
        if not isinstance(tree, Mapping):
            raise UserError(f"{file}: a mapping of options is wanted, not {type(tree).__name__}")
        return dict(_leaves(tree))
    return _words(text)


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif str(name) not in ("defaults", "_target_"):
            yield f"{prefix}{name}", value


def _words(text: str) -> Given:
    """The options of a command line: key=value, --key value..., --key=value, --key (true)."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="")
    lexer.whitespace_split, lexer.commenters = True, "#"
    given: Given = {}
    flag = None
    try:
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"the command line can't be read: {error}") from error
    for word in words:
        match = FLAG.fullmatch(word)
        if match:
            flag = match["key"].replace("-", "_") if match["value"] is None else None
            given[match["key"].replace("-", "_")] = True if match["value"] is None else _value(match["value"])
            continue
        match = ASSIGNMENT.fullmatch(word)
        if match:
            given[match["key"]], flag = _value(match["value"]), None
        elif flag is not None:
            before = given[flag]
            given[flag] = _value(word) if before is True else [*before, _value(word)] if isinstance(before, list) else [
                before, _value(word)]
    return given


def _value(text: str) -> object:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)   # YAML takes 1e-6 for a text
        except ValueError:
            return text
    return value


def _library(given: Given) -> str | None:
    """The library that knows the most of the names; None where none knows any."""
    known = {library: sum(name in others.TABLES[library] for name in given) for library in LIBRARIES}
    known["verl"] += sum(others.section_counterpart(name) is not None and "." in name for name in given)
    best = max(known, key=lambda library: known[library])
    return best if known[best] else None


def _translated(given: Given, library: str) -> Translation:
    given = {**_defaults(given, library), **given}
    derived = DERIVED[library](given)
    ours: dict[str, object] = {}
    without: list[tuple[str, str]] = []
    for name, value in given.items():
        if name in derived or value is None:
            continue
        theirs = others.TABLES[library].get(name) or others.section_counterpart(name)
        option = None if theirs is None else others.option_of(theirs)
        if option is not None:
            ours[option] = others.our_value(name, value)
        elif isinstance(theirs, Missing):
            without.append((name, theirs.instead))
        elif name in OPTIONS:
            ours[name] = value
        elif not name.isupper():   # an environment variable of the script
            without.append((name, f"no option of {LIBRARIES[library]} that is known here"))
    for several in derived.values():
        ours |= several
    overrides = tuple(_override(option, value) for option, value in sorted(ours.items()))
    return Translation(library, overrides, tuple(without))


OPTIONS = {key for key, _ in options()}

Derived = dict[str, dict[str, object]]  # an option of theirs that is dealt with ► ours that follow from it

GRPO_DEFAULTS: Given = {"loss_type": "dapo", "beta": 0.0, "num_generations": 8, "adam_beta1": 0.9, "adam_beta2": 0.999,
                        "lr_scheduler_type": "linear"}
#: Their defaults that ours aren't, of what is minimised. What a file says comes over them.
DEFAULTS: dict[str, Given] = {
    "verl": {
        "actor_rollout_ref.actor.use_kl_loss": False, "actor_rollout_ref.actor.entropy_coeff": 0.0,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean", "algorithm.adv_estimator": "gae", "algorithm.lam": 1.0,
        "actor_rollout_ref.actor.optim.betas": [0.9, 0.999], "actor_rollout_ref.actor.optim.weight_decay": 0.01,
        "actor_rollout_ref.actor.clip_ratio_c": 3.0, "actor_rollout_ref.rollout.n": 1,
    },
    "openrlhf": {"advantage_estimator": "gae", "init_kl_coef": 0.01, "n_samples_per_prompt": 1, "lambd": 1.0},
    "trl": {},
}
_LOSS_TYPES = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "constant_length"}
_PAIR_LOSSES = {"sigmoid": "dpo", "ipo": "ipo"}
_GRPO_ONLY = ("num_generations", "max_completion_length", "epsilon", "num_iterations", "reward_weights")


def _defaults(given: Given, library: str) -> Given:
    """Their defaults, without those that the file gives by another name of the same option."""
    if library == "trl" and (any(name in given for name in _GRPO_ONLY) or given.get("loss_type") in _LOSS_TYPES):
        return GRPO_DEFAULTS
    if library == "openrlhf" and not any("rollout" in name or "advantage" in name for name in given):
        return {}   # sft, pairs, reward models
    table = others.TABLES[library]
    estimator = _first(given, "algorithm.adv_estimator", "advantage_estimator", "algo.advantage.estimator")
    critic = estimator in (None, "gae")
    there = {others.option_of(table[name]) for name in given if name in table}
    named = {str(table[name]) for name in given if name in table}
    return {name: value for name, value in DEFAULTS[library].items()
            if str(table[name]) not in named and (others.option_of(table[name]) or "-") not in there
            and (critic or table[name] != "algo.gae_lambda")}


def _of_verl(given: Given) -> Derived:
    actor = "actor_rollout_ref.actor."
    derived: Derived = {}
    if not given.get(f"{actor}use_kl_loss"):
        derived[f"{actor}use_kl_loss"] = derived[f"{actor}kl_loss_coef"] = {"algo.beta": 0.0}
    else:
        derived[f"{actor}use_kl_loss"] = {}
    if not given.get("algorithm.use_kl_in_reward"):
        derived |= {"algorithm.use_kl_in_reward": {"algo.kl_coef": 0.0}, "algorithm.kl_ctrl.kl_coef": {}}
    else:
        derived["algorithm.use_kl_in_reward"] = {}
    prompts, update = given.get("data.train_batch_size"), given.get(f"{actor}ppo_mini_batch_size")
    if isinstance(prompts, int) and isinstance(update, int) and update and prompts % update == 0:
        derived[f"{actor}ppo_mini_batch_size"] = {"algo.mini_batches": prompts // update}
    gpus = [given.get(f"trainer.{name}", 1) for name in ("nnodes", "n_gpus_per_node")]
    if "trainer.n_gpus_per_node" in given and all(isinstance(count, int) for count in gpus):
        total = int(gpus[0]) * int(gpus[1])   # type: ignore[call-overload]  # looked at in the line above
        split = given.get("actor_rollout_ref.rollout.tensor_model_parallel_size", 2)
        engines = max(total // split, 1) if isinstance(split, int) else total
        placed: dict[str, object] = {
            "train.num_ranks": total, "rollout.num_engines": engines, "cluster.colocate": True}
        derived |= {"trainer.n_gpus_per_node": placed, "trainer.nnodes": {}}
    return derived


def _of_openrlhf(given: Given) -> Derived:
    derived: Derived = {}
    kl = _first(given, "init_kl_coef", "algo.kl.init_coef")
    if kl is not None:
        in_loss = bool(_first(given, "use_kl_loss", "algo.kl.use_loss"))
        options = {"algo.beta": kl if in_loss else 0.0, "algo.kl_coef": 0.0 if in_loss else kl}
        derived |= _all(("init_kl_coef", "algo.kl.init_coef", "use_kl_loss", "algo.kl.use_loss"), options)
    bounds = _first(given, "eps_clip_low_high", "actor.eps_clip_low_high")
    if isinstance(bounds, list) and len(bounds) == 2:
        derived |= _all(("eps_clip_low_high", "actor.eps_clip_low_high"), {
            "algo.clip_range": bounds[0], "algo.clip_range_high": bounds[1]})
    prompts = _first(given, "rollout_batch_size", "rollout.batch_size")
    samples = _first(given, "n_samples_per_prompt", "rollout.n_samples_per_prompt")
    update = _first(given, "train_batch_size", "train.batch_size")
    if isinstance(prompts, int) and isinstance(samples, int) and isinstance(update, int) and update:
        updates, rest = divmod(prompts * samples, update)
        derived |= _all(("train_batch_size", "train.batch_size"), {"algo.mini_batches": updates}) if not rest else {}
    return derived


def _of_trl(given: Given) -> Derived:
    derived: Derived = {}
    loss = given.get("loss_type")
    if loss in _LOSS_TYPES:
        derived["loss_type"] = {"algo.aggregation": _LOSS_TYPES[str(loss)]}
    elif loss in _PAIR_LOSSES:
        derived["loss_type"] = {"algo.name": _PAIR_LOSSES[str(loss)]}
    if given.get("importance_sampling_level") == "sequence":
        derived["importance_sampling_level"] = {"algo.name": "gspo"}
    if {"adam_beta1", "adam_beta2"} & set(given):
        betas = [given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)]
        derived |= _all(("adam_beta1", "adam_beta2"), {"train.adam_betas": betas})
    each, steps = given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps", 1)
    group = given.get("num_generations", 1)
    if isinstance(each, int) and isinstance(steps, int) and isinstance(group, int) and each * steps % group == 0:
        derived |= _all(("per_device_train_batch_size", "gradient_accumulation_steps"), {
            "batch.prompts_per_step": each * steps // group})   # of one process; more of them take as much each
    if given.get("use_peft") is not None:
        derived["use_peft"] = {} if given["use_peft"] else {"train.lora.rank": 0}
    return derived


DERIVED: dict[str, Callable[[Given], Derived]] = {"verl": _of_verl, "openrlhf": _of_openrlhf, "trl": _of_trl}


def _all(names: Sequence[str], ours: dict[str, object]) -> Derived:
    return {name: ours for name in names}


def _first(given: Given, *names: str) -> object:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _override(option: str, value: object) -> str:
    """option=value, as Hydra and a shell read it. An algorithm that is chosen by its group brings its own settings."""
    value = BRACED.sub(r"$\1", value) if isinstance(value, str) else value
    word = f"{'algo' if option == 'algo.name' else option}={hydra_value(value)}"
    if any(option.startswith(f"{key}.") for key in open_options()):
        word = f"+{word}"
    return f'"{word}"' if "$" in word and not set(word) & set("'\"`\\") else shlex.quote(word)


def command(arguments: Sequence[str]) -> None:
    """`flux-ray translate FILE`: prints the command; what has no counterpart stands below it, as comments."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("flux-ray translate FILE: a YAML or JSON file, or a script, of verl, OpenRLHF or TRL")
    translation = translate(Path(arguments[0]))
    print(" \\\n    ".join(["flux-ray train", *translation.overrides]))
    if translation.without:
        print(f"\n# Of {LIBRARIES[translation.library]} without a counterpart:")
    for name, instead in translation.without:
        print(f"#   {name}: {instead}")
