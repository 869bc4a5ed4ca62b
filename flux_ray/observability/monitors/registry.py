"""The monitors by name.

Takes:  the names in `observability.monitors`; classes that plugins register.
Gives:  `register_monitor`, `check_monitors` (UserError for what can't be made), `make_monitors`.
Never:  imports a monitor's library: the monitor does when its run starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from flux_ray.errors import UserError, unknown
from flux_ray.observability.monitors.mlflow import Mlflow
from flux_ray.observability.monitors.monitor import Monitor
from flux_ray.observability.monitors.tensorboard import TensorBoard
from flux_ray.observability.monitors.trackio import Trackio
from flux_ray.observability.monitors.wandb import Wandb
from flux_ray.plugins import same_function

OPTION = "observability.monitors"
OURS: dict[str, type[Monitor]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
_registered: dict[str, type[Monitor]] = {}

M = TypeVar("M", bound=type[Monitor])


def register_monitor(name: str) -> Callable[[M], M]:
    """Register a Monitor's class for `observability.monitors`. It is made without arguments.

    Args:
        name: For `observability.monitors`.

    Raises:
        UserError: The name is taken, or the class is no Monitor.
    """

    def register(kind: M) -> M:
        if not (isinstance(kind, type) and issubclass(kind, Monitor)):
            raise UserError(f"monitor {name!r}: {kind!r} does not inherit from flux_ray.Monitor")
        before = _registered.get(name)
        if name in OURS or (before not in (None, kind) and not _same(before, kind)):
            raise UserError(f"monitor {name!r} is registered already")
        _registered[name] = kind
        return kind

    return register


def _same(one: type[Monitor], other: type[Monitor]) -> bool:
    """Whether both are one class of one file, by two imports."""
    names = {kind.__qualname__ for kind in (one, other)}
    methods = [(vars(one)[key], vars(other).get(key)) for key in vars(one) if callable(vars(one)[key])]
    return len(names) == 1 and all(b is not None and same_function(a, b) for a, b in methods)


def check_monitors(names: Iterable[str], *, more: Mapping[str, type[Monitor]]) -> None:
    """`more`: what others than this folder provide. UserError for a name that is unknown or there twice, or whose
    package isn't installed."""
    known, seen = {**OURS, **more, **_registered}, set()
    for name in names:
        if name not in known:
            raise unknown("monitor", str(name), sorted(known))
        if name in seen:
            raise UserError(f"{OPTION} names {name} twice")
        seen.add(name)
        kind = known[name]
        if kind.module and importlib.util.find_spec(kind.module) is None:
            raise UserError(f"{OPTION}=[{name}] needs a package that isn't installed: pip install {kind.package}")


def make_monitors(names: Iterable[str], *, more: Mapping[str, type[Monitor]]) -> dict[str, Monitor]:
    """A monitor for each name, checked as above."""
    names = list(names)
    check_monitors(names, more=more)
    return {name: {**OURS, **more, **_registered}[name]() for name in names}
