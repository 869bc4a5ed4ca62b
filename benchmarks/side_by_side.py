"""Two bare parts beside one another, a core each: what they then take is what two cores can give at best.

Takes:  a folder that both see, their names, a core.
Gives:  Beside: measured steps begin together, and whoever is done first goes on until the other is.
Never:  waits without a deadline: a part that doesn't come is named.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 600.0  # for the other to come, and to be done
LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Beside:
    """The part `name`, on `core`, beside the part `other`."""

    folder: str
    name: str
    other: str
    core: int

    def stay_on_core(self) -> None:
        """Before any thread is started."""
        os.sched_setaffinity(0, {self.core})

    def meet(self, phase: str) -> None:
        """Waits until the other's measured steps begin as well. TimeoutError names it."""
        self._mark(self.name, phase, "begins").touch()
        ends_s = time.monotonic() + DEADLINE_S
        while not self._mark(self.other, phase, "begins").exists():
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{self.other} did not come within {DEADLINE_S:g} s")
            time.sleep(LOOK_EVERY_S)

    def done(self, phase: str) -> None:
        self._mark(self.name, phase, "done").touch()

    def goes_on(self, phase: str) -> bool:
        """Whether the other still measures."""
        return not self._mark(self.other, phase, "done").exists()

    def _mark(self, name: str, phase: str, what: str) -> Path:
        return Path(self.folder, f"{name}-{phase}-{what}")
