"""The folder for temporary files of a run's actors, where Ray is the run's own.

Gives:  `Scratch`: the folder, what the actors' environment says of it, its end.
Knows:  libraries leave sockets and folders there when they are ended. A path of a socket has 107 characters at most.
Keeps:  a lock on the folder, which the system lets go of when this process has ended, however it ended: a folder that
        nobody holds is removed by the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import tempfile
from pathlib import Path

PREFIX = "flux_ray-tmp-"
LOCK = ".lock"
LONGEST = 107 - len(f"/{PREFIX}12345678/") - 50  # of the folder around it: a socket's name has up to 50


class Scratch:
    def __init__(self) -> None:
        around = Path(tempfile.gettempdir())
        if len(os.fsencode(around)) > LONGEST and os.access("/tmp", os.W_OK | os.X_OK):
            around = Path("/tmp")
        _sweep(around)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=around))
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps it either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def env(self) -> dict[str, str]:
        """What is compiled stays where other runs find it."""
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"
        return {"TMPDIR": str(self.folder), "TORCHINDUCTOR_CACHE_DIR": compiled}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _sweep(around: Path) -> None:
    """Remove what runs that have ended left there."""
    for folder in around.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:  # another user's, or about to be locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its run goes on
            continue
        finally:
            os.close(lock)
