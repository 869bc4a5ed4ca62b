"""Users' code in a child process: start, call, deadline, limits, end as a tree."""

from flux_ray.sandbox.limits import Limits
from flux_ray.sandbox.process import Child, ChildEnded, Entry, warm_up
from flux_ray.sandbox.scratch import clear_left_over

__all__ = ["Child", "ChildEnded", "Entry", "Limits", "clear_left_over", "warm_up"]
