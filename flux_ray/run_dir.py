"""The folder of a run.

Takes:  a Config, with or without run_dir.
Gives:  the Config with an absolute run_dir that exists; a default one belongs to this run alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from pathlib import Path

from flux_ray.config import Config
from flux_ray.errors import UserError


def claim(config: Config) -> Config:
    """`config` with its run_dir made: the one it names, or runs/DATE_TIME under the present folder.

    Two runs that start in one second get two folders. Raises UserError where the folder can't be made.
    """
    try:
        folder = Path(config.run_dir).expanduser().absolute() if config.run_dir else _new()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir or 'runs/DATE_TIME'}: can't be made: {error}") from error
    return dataclasses.replace(config, run_dir=str(folder))


def _new() -> Path:
    name = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    for count in itertools.count(1):
        folder = Path("runs", name if count == 1 else f"{name}_{count}").absolute()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("endless")
