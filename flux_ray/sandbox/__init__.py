"""Users' code in a child process: start, call, deadline, limits, end as a tree."""

from flux_ray.sandbox.limits import Limits
from flux_ray.sandbox.process import SCRATCH, Child, ChildEnded, Entry, warm_up

__all__ = ["SCRATCH", "Child", "ChildEnded", "Entry", "Limits", "warm_up"]
