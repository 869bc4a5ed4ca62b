"""The command line: `flux-ray VERB [overrides]`, also `python -m flux_ray VERB [overrides]`.

Takes:  a verb and Hydra's own arguments and overrides.
Gives:  a validated Config to the driver; exit code 0, 1 for a run that broke, 2 for what the user can mend, 128 + the
        signal that ended it: one line each.
Knows:  that Hydra composes and nothing more: no folder of its own, no log of its own, no change of folder.
Never:  holds a default; is imported by anything. The only file with hydra.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flux_ray
from flux_ray import config as configs
from flux_ray import help as helps
from flux_ray import names, run_dir, settings, signals
from flux_ray.config import Config
from flux_ray.errors import CheckFailed, RunFailed, UserError, unknown
from flux_ray.names.words import as_hydra_reads, hydra_value

RUN_FAILED = 1        # exit code: something broke; the line says what and where the log is
USER_ERROR = 2        # exit code: the user can mend it

#: [+, ++ or ~] key [= value]
OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~|)(?P<key>[^=@~+]+)(?P<value>=.*)?", re.DOTALL)

#: Hydra's flags that take a value.
HYDRA_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
#: Those that take none, or whose value is a word of its own.
OTHER_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--run", "-r", "--multirun",
               "-m", "--shell-completion", "-sc", "--info", "-i", "--experimental-rerun")
#: An experiment's options lie over the whole config, whatever its first line says (conf/config.yaml).
EXPERIMENT, OVER_ALL = re.compile(r"\A(\+\+|\+|~|)experiment(?=\Z|=)"), "@_global_"


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    _speak_utf8()
    arguments = [_as_utf8(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(helps.ABOUT, end="")
        return 0
    if verb == "--version":
        print(f"flux_ray {flux_ray.__version__}")
        return 0
    try:
        command = _command(verb)
        with signals.taken(leave=True):
            return command(rest) or 0
    except UserError as error:
        print(f"flux-ray: {error}", file=sys.stderr)
        return USER_ERROR
    except RunFailed as error:
        broke = "" if isinstance(error, CheckFailed) else "the run failed: "
        print(f"flux-ray: {broke}{error}", file=sys.stderr)
        return RUN_FAILED
    except BrokenPipeError:   # `flux-ray train --help | head`: whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, signals.Interrupted) else signals.Interrupted()
        with contextlib.suppress(OSError):   # the terminal may be gone
            print(f"flux-ray: {ended}", file=sys.stderr, flush=True)
        return ended.exit_code
    return 0


def _speak_utf8() -> None:
    """UTF-8 on the terminal, whatever the locale: prompts, formulas and folders' names have more than ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")


def _as_utf8(argument: str) -> str:
    """Bytes that the locale has no letters for, read as UTF-8."""
    try:
        return argument.encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:   # letters that the locale has, or bytes that aren't UTF-8
        return argument


def train(overrides: list[str]) -> None:
    if {"-h", "--help"} & set(overrides):
        print(helps.TRAIN)
        print(helps.groups_help())
        print(helps.options_help())
        return
    only_print, overrides = _only_prints(overrides)
    compose(overrides, then=_print if only_print else _run)


def _only_prints(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether they ask for the config alone (Hydra's `--cfg job`), and the others. Hydra's own config it prints itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--resolve", action="store_true")
    asked, others = parser.parse_known_args(arguments)
    return (True, others) if asked.cfg == "job" else (False, arguments)


def _print(config: Config) -> None:
    print(configs.to_yaml(configs.check_values(config)), end="")


def _run(config: Config) -> None:
    from flux_ray import run as runs

    runs.run(configs.validate(config))


def explain(overrides: list[str]) -> None:
    if {"-h", "--help"} & set(overrides):
        print(helps.ABOUT, end="")
        return
    compose(overrides, then=_explain)


def _explain(config: Config) -> None:
    from flux_ray.algo.check import check
    from flux_ray.algo.explain import explain as explained
    from flux_ray.algo.trial import try_registered
    from flux_ray.plugins import load_plugins

    load_plugins(config.plugins)
    warnings = check(configs.check_values(config))   # an objective doesn't depend on model and data
    try_registered(config)
    for heading, text in explained(config):
        print(helps.paragraph(f"{heading:<12} {text}", indent=13))
    for warning in warnings:
        print(helps.paragraph(f"warning: {warning}", indent=len("warning: ")))


#: Verbs that compose a config.
COMPOSING: dict[str, Callable[[list[str]], None]] = {"train": train, "explain": explain}
#: Other verbs ► the module whose `command` they are: from words to the exit code, or None for 0.
COMMANDS = {"translate": "flux_ray.translate", "info": "flux_ray.info", "audit": "flux_ray.audit",
            "checkpoint": "flux_ray.checkpoints", "replay": "flux_ray.replay", "metrics": "flux_ray.metrics",
            "eval": "flux_ray.evaluations", "chat": "flux_ray.chat", "generate": "flux_ray.generate",
            "passrates": "flux_ray.pass_rates",
            "view": "flux_ray.observability.page.view", "report": "flux_ray.observability.page.report",
            "compare": "flux_ray.observability.page.compare"}


def _command(verb: str) -> Callable[[list[str]], int | None]:
    if verb in COMPOSING:
        return COMPOSING[verb]
    if verb not in COMMANDS:
        raise unknown("verb", verb, [*COMPOSING, *COMMANDS])
    command: Callable[[list[str]], int | None] = importlib.import_module(COMMANDS[verb]).command
    return command


@functools.cache
def _store_schema() -> None:
    """Give Hydra our options and their types, once a process. It copies them for each command."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="defaults_in_config_py", node=configs.schema())


def compose(overrides: list[str], *, then: Callable[[Config], None]) -> None:
    """Hydra's command line over `overrides`; `then` gets the Config it composed (each of them in a --multirun).

    A single run goes on after Hydra has returned, so that its errors are our own and Hydra's are about composing alone.
    Raises UserError for whatever Hydra, or OmegaConf, refuses.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    composed: list[tuple[dict[str, Any], list[str]]] = []

    overrides = _with_given(_joined(overrides))
    _refuse_dashes(overrides)
    written = [match["key"] for match in map(OVERRIDE.fullmatch, overrides) if match]

    def task(tree: Any) -> None:
        settings, given = HydraConfig.get(), configs.given(tree)
        if settings.mode == RunMode.MULTIRUN:
            names.refuse_ambiguous(given.get("algo.name"), written)
            then(configs.from_dict({"run_dir": settings.runtime.output_dir, **given}))
        else:
            words = configs.as_written(settings.overrides.task)
            composed.append((given, [word.replace(OVER_ALL, "", 1) for word in words]))

    _store_schema()
    application = hydra.main(version_base="1.3", config_path=str(configs.CONF.resolve()), config_name="config")(task)
    with _command_line(_by_our_names(overrides)):
        try:
            _refuse_disagreement(overrides)
            _refuse_deletion(overrides)
            application()
        except HydraException as error:
            raise _one_line(error) from error
    for given, words in composed:
        names.refuse_ambiguous(given.get("algo.name"), written)
        resumed = run_dir.resumed_run(given.get("resume"), given.get("run_dir"))
        goes_on = resumed and resumed != run_dir.AUTO
        then(_resumed({**given, "resume": resumed}, words) if goes_on else configs.from_dict(given))


def _joined(arguments: list[str]) -> list[str]:
    """Each of Hydra's own flags in one word with its value: `--config-dir .` has no override in it."""
    words = iter(arguments)
    return [f"{word}={next(words, '')}" if word in HYDRA_FLAGS else word for word in words]


def _with_given(overrides: list[str]) -> list[str]:
    """With what --config FILE and the environment give, where the command line doesn't say otherwise."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    asked, others = parser.parse_known_args(overrides)
    values = {**(settings.from_file(asked.config) if asked.config else {}), **settings.from_environment()}
    said = {match["key"] for match in map(OVERRIDE.fullmatch, map(_by_our_name, others)) if match}
    said |= {"algo.name"} if "algo" in said else set()
    mappings = configs.open_options()
    return [f"{'++' if any(key.startswith(f'{name}.') for name in mappings) else ''}{key}={hydra_value(value)}"
            for key, value in values.items() if key not in said] + others


def _resumed(given: dict[str, Any], overrides: list[str]) -> Config:
    """The config of the run that goes on, with the options that the command line names over it.

    A command line that chooses a group (experiment=..., algo=...) is taken whole, as for a new run.
    """
    keys = {match["key"] for match in map(OVERRIDE.fullmatch, overrides) if match}
    if keys & set(helps.groups()):
        return configs.from_dict(given)
    named = {option: value for option, value in given.items()
             if any(key == option or key.startswith(f"{option}.") or option.startswith(f"{key}.") for key in keys)}
    return configs.from_dict(named, before=run_dir.saved_config(given["resume"]))


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv; with HYDRA_FULL_ERROR it lets errors fly instead of printing them and leaving."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["flux-ray train", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _keys() -> list[str]:
    return [key for key, _ in configs.options()]


def _by_our_names(overrides: list[str]) -> list[str]:
    """Each by our name for it. `algo.name=dapo` is `algo=dapo`, whose preset comes with it as in Python, but where the
    group is chosen as well."""
    several = bool({"-m", "--multirun"} & set(overrides))
    named = [_quoted(_by_our_name(override), several=several) for override in overrides]
    named = [EXPERIMENT.sub(rf"\1experiment{OVER_ALL}", override) for override in named]
    if any(override.startswith("algo=") for override in named):
        return named
    prefix, presets = "algo.name=", set(helps.groups()["algo"])
    return [override.replace(prefix, "algo=", 1)
            if override.startswith(prefix) and set(override.removeprefix(prefix).split(",")) <= presets else override
            for override in named]


def _quoted(override: str, *, several: bool) -> str:
    """In Hydra's grammar: a path, a prompt, a pattern may have any character, and one value of a list no brackets.

    Where several values may be meant (--multirun), a comma divides them as ever.
    """
    match = OVERRIDE.fullmatch(override)
    value = (match["value"] or "")[1:] if match else ""
    kind = _kind(match["key"]) if match else ""
    if not match or not value or not kind or "${" in value:
        return override
    meant = as_hydra_reads(value, kind=kind, key=match["key"], several=several, parse=_parsed)
    return override if meant == value else f"{match['sign']}{match['key']}={meant}"


def _kind(key: str) -> str:
    """An option's type, as it is written; Any within an open mapping; "" for a choice, and for what is no option."""
    if key.startswith(tuple(f"{name}." for name in configs.open_options())):
        return "Any"
    return next((str(f.type) for name, f in configs.options() if name == key and not f.metadata["choices"]), "")


def _parsed(override: str) -> Any:
    """As Hydra reads it; None where it can't."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _by_our_name(override: str) -> str:
    """`epsilon=.3` ► `algo.clip_range=.3`, `algo=drgrpo` ► `algo=dr_grpo`; what isn't an alias stays as it is."""
    match = OVERRIDE.fullmatch(override)
    if not match or override.startswith("-") or "/" in match["key"]:
        return override
    sign, key, value = match["sign"], match["key"], match["value"] or ""
    if key in ("algo", "algorithm", "algo.name"):
        several = [names.ALGORITHM_ALIASES.get(name, name) for name in value.removeprefix("=").split(",")]
        key, value = ("algo" if key == "algorithm" else key), "=" + ",".join(several)
    elif not key.startswith("hydra.") and ("." in key or key not in helps.groups()):
        # Without a full stop it may be a group in a folder of the user's own: Hydra knows.
        with contextlib.nullcontext() if "." in key else contextlib.suppress(UserError):
            ours = names.canonical(key, options=_keys())
            if ours != key and value:
                value = f"={_in_our_words(key, value[1:])}"
            key = ours
    return f"{sign}{key}{value}"


def _in_our_words(their_name: str, text: str) -> str:
    """A value's text as Hydra reads it."""
    value = names.our_value(their_name, text)
    return text if value is text else hydra_value(value)


def _refuse_disagreement(overrides: list[str]) -> None:
    """Two names of one option with different values; the same name twice is Hydra's matter: the last one wins."""
    said: dict[str, tuple[str, str]] = {}
    for override in overrides:
        match, ours = OVERRIDE.fullmatch(override), OVERRIDE.fullmatch(_by_our_name(override))
        if override.startswith("-") or not match or not ours or match["value"] is None:
            continue
        name, value = said.setdefault(ours["key"], (match["key"], match["value"]))
        if name != match["key"] and value != match["value"]:
            raise UserError(f"{ours['key']}: {name}{value} and {match['key']}{match['value']}; give one of them")


def _refuse_dashes(words: list[str]) -> None:
    """UserError for an option as most programs have them: --learning_rate 1e-6."""
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("-") and flag not in (*HYDRA_FLAGS, *OTHER_FLAGS):
            key = names.canonical(flag.lstrip("-").replace("-", "_"), options=_keys())
            raise UserError(f"{word}: options have no dashes, and one word: {key}={value if equals else 'VALUE'}")


def _refuse_deletion(overrides: list[str]) -> None:
    keys = _keys()
    for match in filter(None, map(OVERRIDE.fullmatch, overrides)):
        if match["sign"] == "~" and match["key"] in keys:
            raise UserError(f"{match['key']}: an option can't be taken away, only given another value (~ is for groups "
                            "and open mappings)")


def _one_line(error: Exception) -> UserError:
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return unknown(group or "config", choice, error.options)
    if isinstance(error, OverrideParseException):
        return UserError(f"{error.override!r} is no override (key=value, +key=value, ~key): "
                         f"{error.message.splitlines()[0]}")
    explained = names.explain(error, options=_keys()) or UserError(" ".join(str(error).split()))
    file = re.match(r"In '(.+)': .* raised while composing", str(error))
    return UserError(f"{file[1]}.yaml: {explained}") if file else explained


if __name__ == "__main__":
    sys.exit(main())
