"""A home folder and a user's name for libraries that can't do without.

Gives:  `ensure_home`.
Knows:  containers run under numbers that no user has, without HOME, or with one that can't be written to.
Never:  changes what works.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """HOME is a folder that can be written to, and the user has a name: here, and in every process started from here.

    Ray, vLLM, torch and the hub's client keep files under HOME; torch names its cache by the user.
    """
    home = Path(os.environ.get("HOME") or "/")
    if home == Path("/") or not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        os.environ["HOME"] = str(_made())
    try:
        getpass.getuser()
    except (KeyError, OSError):   # KeyError until Python 3.12
        os.environ["USER"] = f"user-{os.getuid()}"


def _made() -> Path:
    """A folder of this user's alone: what another user put under its name is left where it is."""
    home = Path(tempfile.gettempdir(), f"flux_ray-home-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return home if own else Path(tempfile.mkdtemp(prefix="flux_ray-home-"))
