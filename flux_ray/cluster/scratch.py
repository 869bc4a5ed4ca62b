"""The folder for temporary files of a run's actors, where Ray is the run's own.

Gives:  `Scratch`, a HeldFolder; what the actors' environment says of it; `name_semaphores`, for an actor.
Knows:  libraries leave sockets and folders there when they are ended. A path of a socket has 107 characters at most.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import re
import tempfile
from pathlib import Path

from flux_ray.held_folder import HeldFolder, remove_left_over

PREFIX = "flux_ray-tmp-"
LONGEST = 107 - len(f"/{PREFIX}12345678/") - 50  # of the folder around it: a socket's name has up to 50


class Scratch(HeldFolder):
    def __init__(self) -> None:
        around = Path(tempfile.gettempdir())
        if len(os.fsencode(around)) > LONGEST and os.access("/tmp", os.W_OK | os.X_OK):
            around = Path("/tmp")
        remove_left_over(PREFIX, around)
        super().__init__(PREFIX, around)

    @property
    def env(self) -> dict[str, str]:
        """What is compiled stays where other runs find it."""
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"
        return {"TMPDIR": str(self.folder), "TORCHINDUCTOR_CACHE_DIR": compiled}


def name_semaphores() -> None:
    """Those that libraries make in this actor bear the folder's name: who removes it finds them in /dev/shm.

    Else one of each engine stays there, for Ray ends the process that would remove it.
    """
    folder = Path(os.environ.get("TMPDIR", "")).name
    if folder.startswith(PREFIX):
        # Nothing public sets it. Processes that this one starts take it over.
        multiprocessing.current_process()._config["semprefix"] = f"/{folder}"  # type: ignore[attr-defined]
