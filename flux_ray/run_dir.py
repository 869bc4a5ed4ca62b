"""The folder of a run.

Takes:  a Config, with or without run_dir.
Gives:  the Config with an absolute run_dir that exists, a default one belonging to this run alone; `held`, its lock;
        `check_seen`; `resumed_run`, what resume=auto means; `saved_config`, of a run that is resumed; `hidden` and
        `shown`: a config without its secrets, and with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flux_ray.config import Config, changed
from flux_ray.errors import UserError
from flux_ray.secrecy import is_secret

CONFIG = "config.yaml"  # the first file of a run, which the driver writes
AUTO = "auto"  # as `resume`: go on with what lies in run_dir
BAD_BATCHES = "bad_batches"  # of steps that a number left out which was not finite
HIDDEN = "***"  # stands in CONFIG for a secret
LOCK = ".lock"  # held by the process of a run as long as it lives


def claim(config: Config) -> Config:
    """`config` with its run_dir made: the one it names, that of the run it resumes, or runs/DATE_TIME under the
    present folder.

    Two runs that start in one second get two folders. Raises UserError where the folder can't be made.
    """
    try:
        if config.run_dir:
            folder = Path(config.run_dir).expanduser().absolute()
        else:
            folder = run_of(config.resume) if config.resume else _new()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir or 'runs/DATE_TIME'}: can't be made: {error}") from error
    return dataclasses.replace(config, run_dir=str(folder))


@contextlib.contextmanager
def held(run_dir: str) -> Iterator[None]:
    """The folder is this process's alone. The system lets go of it when the process ends, however it ends.

    Raises UserError, with who holds it, where another run writes to it.
    """
    with _opened_lock(run_dir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"run_dir={run_dir}: a run that goes on writes to it ({file.read().strip()}); end it "
                            "first, or name another folder") from None
        except OSError:
            pass   # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_held(run_dir: str | Path) -> bool:
    """Whether a run that goes on writes to the folder."""
    try:
        with Path(run_dir, LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:   # there is no lock
        return False
    return False


def _opened_lock(run_dir: str) -> TextIO:
    try:
        return Path(run_dir, LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: can't be written to: {error.strerror}") from error


def resumed_run(resume: str | None, run_dir: str | None) -> str | None:
    """The run that `resume` names. `auto` is the one in run_dir, or stays where that has no checkpoint yet.

    UserError for auto without run_dir.
    """
    if resume != AUTO:
        return resume
    if not run_dir:
        raise UserError("resume=auto goes on with what lies in run_dir: name the folder (run_dir=...)")
    folder = Path(run_dir).expanduser().absolute()
    return str(folder) if any((folder / "checkpoints").glob("step-*")) else AUTO


def is_begun(run_dir: str) -> bool:
    """Whether a run has written to the folder."""
    return (Path(run_dir).expanduser() / CONFIG).is_file()


def run_of(resume: str) -> Path:
    """The run folder that `resume` names: itself, or the one that its checkpoint lies in."""
    path = Path(resume).expanduser().absolute()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def saved_config(resume: str, *, named: str = "resume=") -> dict[str, object]:
    """The options of a run, as it saved them. UserError where there is no such run.

    `named`: what stands before it in a message.
    """
    file = run_of(resume) / CONFIG
    if not file.is_file():
        raise UserError(f"{named}{resume}: there is no {file}, so no run")
    try:
        loaded = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{named}{resume}: {file} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig) or "algo" not in loaded:   # each run's has it
        raise UserError(f"{named}{resume}: {file} holds no run's options: it was cut, or another file has its place")
    values = OmegaConf.to_container(loaded)
    return {**_as_now(values), "run_dir": str(run_of(resume))}  # type: ignore[arg-type]  # where it lies now


def _as_now(values: dict[str, object]) -> dict[str, object]:
    """Options of an earlier version by those that took their place."""
    observability = values.get("observability")
    if not isinstance(observability, dict) or "tensorboard" not in observability:
        return values
    others = {name: value for name, value in observability.items() if name != "tensorboard"}
    monitors = {"monitors": ["tensorboard"]} if observability["tensorboard"] else {}
    return {**values, "observability": monitors | others}


def check_seen(run_dir: str) -> None:
    """UserError where this process, maybe on another machine than the driver, doesn't see the run's folder.

    It would write checkpoints and the model where nobody looks for them.
    """
    if not Path(run_dir, CONFIG).is_file():
        raise UserError(f"run_dir={run_dir}: machine {socket.gethostname()}, where a rank trains, doesn't see what the "
                        "driver wrote there: name a folder that all machines share")


def hidden(config: Config) -> Config:
    """As it is written down: without the values of `cluster.env` whose names are those of secrets."""
    return changed(config, {"cluster.env": {
        name: HIDDEN if is_secret(name) else value for name, value in config.cluster.env.items()}})


def shown(config: Config) -> Config:
    """With the values that weren't written down, from this process's environment. UserError where one isn't there."""
    env = dict(config.cluster.env)
    for name in [name for name, value in env.items() if value == HIDDEN]:
        if name not in os.environ:
            raise UserError(f"cluster.env.{name}: a run doesn't write such a value down; set {name} in the "
                            "environment, or give the option again")
        env[name] = os.environ[name]
    return changed(config, {"cluster.env": env})


#: Part of the path of the folder that Ray unpacks a job's --working-dir into. It is deleted with the job.
OF_A_JOB = "runtime_resources/working_dir_files"


def _new() -> Path:
    if OF_A_JOB in str(Path.cwd()):
        raise UserError("run_dir is missing: this job runs in a copy of its working directory, which Ray deletes with "
                        "the job, and the run in it; name a folder that stays and that all machines share "
                        "(run_dir=...)")
    name = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    for count in itertools.count(1):
        folder = Path("runs", name if count == 1 else f"{name}_{count}").absolute()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("endless")
