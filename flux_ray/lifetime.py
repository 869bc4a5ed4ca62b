"""A process that must not outlive the one that started it, however that one ended.

Takes:  nothing.
Gives:  `end_with_parent`; `register`, an entry point of vLLM's general plugins for the processes that vLLM starts.
Knows:  SIGKILL (the kernel's, when memory is short) lets nobody say goodbye, and an orphan keeps its memory or GPU.
Never:  ends a process that this run did not start.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

LOOK_EVERY_S = 1.0  # a parent's death shows that late: runs promise to be gone within 15 s
OWN_GROUP = "FLUX_RAY_OWN_GROUP"  # set: a terminal's Ctrl-C is for who started vLLM's processes, not for those
PLUGIN = "flux_ray_lifetime"  # as pyproject.toml names the entry point


def end_with_parent() -> None:
    """From now on this process ends, at once and without cleaning up, when its parent has."""
    parent = os.getppid()
    _end_unless(lambda: os.getppid() == parent)


def register() -> None:
    """Called in each of vLLM's processes; of use in those that vLLM itself started for an engine of ours."""
    starter = multiprocessing.parent_process()  # who asked for it: what forked it may be another process
    if starter is None or PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    if OWN_GROUP in os.environ:
        os.setpgid(0, 0)

    import psutil

    try:
        process = psutil.Process(starter.pid)  # knows another one of the same number by its start
    except psutil.NoSuchProcess:
        os._exit(1)
    _end_unless(process.is_running)


def _end_unless(lives: Callable[[], bool]) -> None:
    def watch() -> None:
        while lives():
            time.sleep(LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
