"""Monitors: what gets the metrics, the evaluations and the events of a run, as `observability.monitors` names them."""

from flux_ray.observability.monitors.driving import Monitors
from flux_ray.observability.monitors.monitor import Monitor, Run
from flux_ray.observability.monitors.registry import check_monitors, make_monitors, register_monitor

__all__ = ["Monitor", "Monitors", "Run", "check_monitors", "make_monitors", "register_monitor"]
