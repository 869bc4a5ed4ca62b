"""A temporary folder that goes with the process that made it, however that one ended.

Gives:  `HeldFolder`; `remove_left_over`, what killed processes left.
Knows:  the process holds a lock in the folder, which the system lets go of when the process has ended.
Never:  removes the folder of a process that lives. A folder has its name only once it is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = ".lock"


class HeldFolder:
    def __init__(self, prefix: str, around: Path | None = None) -> None:
        """A new folder of that prefix in `around`, or where temporary files lie."""
        new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=around))
        self._lock = os.open(new / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes it there either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.folder = new.rename(new.with_name(new.name.removeprefix(".")))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_left_over(prefix: str, around: Path | None = None) -> None:
    """Folders of that prefix that nobody holds."""
    for folder in (around or Path(tempfile.gettempdir())).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another user's, or its process lives
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
