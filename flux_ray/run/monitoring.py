"""The monitors that a run's config names.

Takes:  a Config whose plugins are loaded.
Gives:  `check`, before anything starts; `start`, monitors that know the run; `HOOKS`, those of other folders.
"""

from __future__ import annotations

from collections.abc import Callable

from flux_ray import run_dir
from flux_ray.cluster.prometheus import Prometheus
from flux_ray.config import Config, options_of, value_of
from flux_ray.observability.monitors import Monitor, Monitors, Run, check_monitors, make_monitors
from flux_ray.observability.run_folder import RunFolder

HOOKS: dict[str, type[Monitor]] = {"prometheus": Prometheus}


def check(config: Config) -> None:
    """UserError for a monitor that can't be made."""
    check_monitors(config.observability.monitors, more=HOOKS)


def start(config: Config, folder: RunFolder, *, first_step: int, warn: Callable[[str], None]) -> Monitors:
    monitors = Monitors(make_monitors(config.observability.monitors, more=HOOKS), warn=warn)
    written = run_dir.hidden(config)
    values = {key: value_of(written, key) for key, _ in options_of(type(config))}
    monitors.started(Run(folder.path, values, first_step, config.driver.num_steps))
    return monitors
