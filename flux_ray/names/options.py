"""What people call an option, and what it is called here.

Takes:  keys and nested values as users write them; the options that exist are given by the caller.
Gives:  `canonical` (one key), `flatten` (dotted key ► value), `unknown_option`, `explain` (OmegaConf's errors).
Knows:  short names, papers' names and those that were ours (ALIASES, RENAMED); `others`: other libraries' names.
Never:  guesses: two names of one option that disagree, and a name that fits several options, are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flux_ray.errors import UserError
from flux_ray.names import others
from flux_ray.names.counterpart import Missing

#: Name that people bring ► option. Written alone (`n`), in the algorithm's section (`algo.n`) or in the option's own.
ALIASES = {
    "model_path": "model.path", "model_name": "model.path", "dataset_name": "data.train", "prompts": "data.train",
    "algorithm": "algo.name", "algo": "algo.name",
    "clip_ratio": "algo.clip_range", "cliprange": "algo.clip_range",
    "epsilon": "algo.clip_range", "eps_clip": "algo.clip_range",
    "clip_ratio_high": "algo.clip_range_high", "epsilon_high": "algo.clip_range_high",
    "eps_clip_high": "algo.clip_range_high",
    "num_generations": "rollout.group_size", "n": "rollout.group_size",
    "n_samples_per_prompt": "rollout.group_size", "num_samples": "rollout.group_size",
    "kl_loss_coef": "algo.beta",
    "normalize_advantages": "algo.normalize_by_std",
    "lr": "train.learning_rate",
    # The critic has options of these names too; without a section they are the policy's.
    "learning_rate": "train.learning_rate", "warmup_steps": "train.warmup_steps", "clip_range": "algo.clip_range",
    "lora_rank": "train.lora.rank", "lora_r": "train.lora.rank", "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout", "target_modules": "train.lora.targets",
    "lora_target_modules": "train.lora.targets",
}

#: Old name of an option or a metric ► its name now, both in full. The old name is refused, and the new one told.
RENAMED: dict[str, str] = {"observability.tensorboard": "observability.monitors"}

#: Other spellings of an algorithm's name.
ALGORITHM_ALIASES = {"drgrpo": "dr_grpo", "dr-grpo": "dr_grpo", "Dr. GRPO": "dr_grpo", "GRPO": "grpo", "DAPO": "dapo",
                     "PPO": "ppo", "RLOO": "rloo", "GSPO": "gspo", "CISPO": "cispo", "DPO": "dpo", "IPO": "ipo",
                     "SFT": "sft", "REINFORCE": "reinforce"}

#: Sections by the names that people give them. `algorithm_config` may hold any option by its short name.
SECTION_ALIASES = {"algorithm": "algo", "algorithm_config": "algo", "lora": "train.lora"}

REWARD_MODEL = "model:"   # before a reward model's path in reward.functions
NAMES_OF_A_REWARD_MODEL = ("reward_model_name", "reward_model_path", "reward_model")   # elsewhere: no option here

NEAR_ENOUGH = 0.75   # difflib's ratio from which a name is worth suggesting


def reward_model_path(reference: str) -> str | None:
    """The folder or hub name of `model:PATH`; None for any other entry of reward.functions."""
    return reference.removeprefix(REWARD_MODEL) if reference.startswith(REWARD_MODEL) else None


def reward_name(reference: str) -> str:
    """What an entry of reward.functions is called in metrics and options: a model's folder, or a function's name.

    >>> reward_name("numeric"), reward_name("my.py:mine"), reward_name("model:org/Judge"), reward_name("model:a/model")
    ('numeric', 'mine', 'Judge', 'a')
    """
    path = reward_model_path(reference)
    if path is None:
        return reference.rpartition(":")[2]
    parts = [part for part in path.split("/") if part]
    own = parts[-2:-1] if parts[-1:] == ["model"] else []   # the folder of a run holds its result as `model`
    return (own or parts[-1:] or [path])[0]


def canonical(key: str, *, options: Collection[str]) -> str:
    """The option that a key means; the key itself where it is one already, or lies in an option that is a mapping.

    >>> canonical("algo.epsilon", options=["algo.clip_range"])
    'algo.clip_range'
    >>> canonical("grop_size", options=["rollout.group_size"])
    Traceback (most recent call last):
    flux_ray.errors.UserError: unknown option 'grop_size': did you mean 'rollout.group_size'?
    """
    section, _, last = key.rpartition(".")
    section = SECTION_ALIASES.get(section, section)
    named = f"{section}.{last}" if section else last
    if named in options or any(named.startswith(f"{option}.") for option in options):
        return named
    fits = [ALIASES[last]] if last in ALIASES else [o for o in options if o.rpartition(".")[2] == last]
    fits = [option for option in fits if section in ("", "algo") or option.startswith(f"{section}.")]
    if len(fits) == 1:
        return fits[0]
    theirs = others.counterpart(key)
    option = None if theirs is None else others.option_of(theirs)
    if option is not None:
        return option
    if fits and theirs is None:
        raise UserError(f"option {key!r} could be any of {', '.join(fits)}: write it in full")
    raise unknown_option(key, options=options)


def flatten(values: Mapping[str, object], *, options: Collection[str]) -> dict[str, Any]:
    """Nested, dotted and short names, in any mixture, as option ► value.

    >>> flatten({"algorithm": "grpo", "algorithm_config": {"epsilon": .3}}, options=["algo.name", "algo.clip_range"])
    {'algo.name': 'grpo', 'algo.clip_range': 0.3}

    Raises UserError for an unknown name, and for two names of one option with different values.
    """
    flat: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for written, value in _leaves(values, prefix="", options=options):
        key = canonical(written, options=options)
        value = others.our_value(written, value) if written != key else value
        if key == "algo.name" and isinstance(value, str):
            value = ALGORITHM_ALIASES.get(value, value)
        if key in flat and flat[key] != value:
            raise UserError(f"{key}: {said_by[key]} says {flat[key]!r} and {written} says {value!r}; give one of them")
        flat[key], said_by[key] = value, written
    refuse_ambiguous(flat.get("algo.name"), [said_by.get("algo.clip_range_high", "")])
    return flat


def refuse_ambiguous(algorithm: str | None, written: Collection[str]) -> None:
    """UserError for a written name by which other libraries mean another number, for this algorithm."""
    if algorithm == "cispo" and any(name.rpartition(".")[2] == "epsilon_high" for name in written):
        raise UserError("epsilon_high: for cispo some libraries mean the bound itself by it (5 is our 4): "
                        "give algo.clip_range_high, which the bound is 1 above")


def _leaves(values: Mapping[str, object], *, prefix: str, options: Collection[str]) -> Iterator[tuple[str, Any]]:
    sections = {section for option in options for section in sections_of(option)} | set(SECTION_ALIASES)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (key in sections or others.is_section(key)):
            yield from _leaves(value, prefix=f"{key}.", options=options)
        elif key in sections and key not in ALIASES:
            raise UserError(f"{key}: holds several options, so it takes a mapping, not {value!r}")
        else:
            yield key, value


def sections_of(option: str) -> list[str]:
    """The sections that an option lies in, the outermost first.

    >>> sections_of("train.lora.rank")
    ['train', 'train.lora']
    """
    parts = option.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def unknown_option(key: str, *, options: Collection[str]) -> UserError:
    """The error for an option that doesn't exist: its new name, or the nearest, of its own section before any other."""
    section, _, last = key.rpartition(".")
    for old, new in RENAMED.items():
        if key in (old, old.rpartition(".")[2]):
            return UserError(f"option {key!r} has a new name: {new!r}")
    if last in NAMES_OF_A_REWARD_MODEL:
        return UserError(f"unknown option {key!r}: a reward model is one of reward.functions, as {REWARD_MODEL}PATH")
    theirs = others.counterpart(key)
    if isinstance(theirs, Missing):
        return UserError(f"no option {key!r} here: {theirs.instead}")
    instead = others.section_counterpart(key)
    if instead is not None and section.partition(".")[0] not in {option.partition(".")[0] for option in options}:
        return UserError(f"no option {key!r} here: {instead.instead}")
    meant = {option: option for option in options} | ALIASES   # name that could have been meant ► option
    for candidates in ([name for name in meant if name.startswith(f"{section}.")], list(meant)):
        by_last = {name.rpartition(".")[2] for name in candidates}
        near = difflib.get_close_matches(last, by_last, n=1, cutoff=NEAR_ENOUGH)
        if near:
            same = [meant[name] for name in candidates if name.rpartition(".")[2] == near[0]]
            best = max(same, key=lambda option: difflib.SequenceMatcher(None, key, option).ratio())
            return UserError(f"unknown option {key!r}: did you mean {best!r}?")
    if instead is not None:
        return UserError(f"no option {key!r} here: {instead.instead}")
    return UserError(f"unknown option {key!r} (flux-ray train --help lists them all)")


def explain(error: BaseException, *, options: Collection[str]) -> UserError | None:
    """OmegaConf's refusal of a key or a value (or whatever was caused by one) in one line; None for other errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    key = cause.full_key or str(cause.key)
    if isinstance(cause, (ConfigKeyError, AttributeError)):
        return unknown_option(key, options=options)
    first_line = (cause.msg or str(cause)).splitlines()[0]
    got = "" if cause.value is None or str(cause.value) in first_line else f" (got {cause.value!r})"
    return UserError(f"{key}: {first_line}{got}")
