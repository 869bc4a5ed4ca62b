"""Users' code in a child process: start, call, deadline, end as a tree."""

from flux_ray.sandbox.process import Child, ChildEnded, Entry, warm_up

__all__ = ["Child", "ChildEnded", "Entry", "warm_up"]
