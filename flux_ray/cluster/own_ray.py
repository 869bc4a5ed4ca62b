"""The processes of a Ray that a run started for itself.

Takes:  nothing: it looks at the Ray that this process has just started.
Gives:  `OwnRay`: `death`, who of them died; `end`, so that none is left.
Knows:  each of them leads a session of its own, which its children are in.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import ray

from flux_ray.cluster.group import ActorDied

LOOK_EVERY_S = 0.5
NEEDED = ("gcs_server", "raylet")  # without these nothing can be started, or told of


class OwnRay:
    def __init__(self, scratch: Path) -> None:
        """`scratch`: a folder that is removed in the end, however this process ends."""
        processes = ray._private.worker._global_node.all_processes  # nothing public tells them
        self._processes = {name: info.process for name, infos in processes.items() for info in infos}
        self._sessions = [process.pid for process in self._processes.values()]
        reaper = Path(__file__).with_name("reaper.py")
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(reaper), str(scratch), *map(str, self._sessions)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    @property
    def dead(self) -> ActorDied | None:
        """The death of one that is needed, if it has died."""
        name = next((name for name in NEEDED if self._processes[name].poll() is not None), None)
        if name is None:
            return None
        return ActorDied(f"Ray's {name} (process {self._processes[name].pid}) died", role="ray", index=0)

    async def death(self) -> ActorDied:
        """Waits until one that is needed has died."""
        while (death := self.dead) is None:  # noqa: ASYNC110 a process's end sets no event
            await asyncio.sleep(LOOK_EVERY_S)
        return death

    def kill(self) -> None:
        """All of them, and what they started, at once: nobody answers any more."""
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) in self._sessions:
                    os.kill(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

    def end(self) -> None:
        """Ray has been left: what it forgot is ended soon."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(timeout=30)
