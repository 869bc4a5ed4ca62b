"""A home folder and a user's name for libraries that can't do without.

Gives:  `ensure_home`.
Knows:  containers run under numbers that no user has, without HOME, or with one that can't be written to.
Never:  changes what works.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """HOME is a folder that can be written to, and the user has a name: here, and in every process started from here.

    Ray, vLLM, torch and the hub's client keep files under HOME; torch names its cache by the user.
    """
    home = Path(os.environ.get("HOME") or "/")
    if home == Path("/") or not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        home = Path(tempfile.gettempdir(), f"flux_ray-home-{os.getuid()}")
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
    try:
        getpass.getuser()
    except (KeyError, OSError):   # KeyError until Python 3.12
        os.environ["USER"] = f"user-{os.getuid()}"
