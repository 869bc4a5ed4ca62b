"""What a machine must have for a run, made good where we can.

Gives:  `adapt`: a short TMPDIR, as many open files as are allowed, GPUs that are hidden told to libraries;
        `refuse_own_ray`, `shared_memory_warning`: before a Ray of the run's own starts.
Knows:  a socket's path has 107 bytes; Ray splits commands at blanks; a run needs hundreds of open files.
Never:  changes what works.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from flux_ray.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHM_GIB = 1.0  # Ray's object store of a run of its own, and buckets of weights
GIB = 2**30

#: TMPDIR, then /ray/session_2026-11-28_18-18-08_123456_4194304/sockets/plasma_store.1: 107 bytes at most.
LONGEST_TMPDIR = 107 - 70
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

LEAST_OPEN_FILES = 1024  # of Ray and its actors
MOST_OPEN_FILES = 65536  # where nothing bounds them
HIDDEN = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES that shows no GPU


def adapt() -> None:
    """For this process, and for every one that is started from here. UserError: what must be mended by hand."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not Path("/dev/nvidiactl").exists():
        # Said beforehand, or DeepSpeed (which transformers may import) warns on the terminal that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _shorten_tmpdir()
    _open_more_files()


def _shorten_tmpdir() -> None:
    """A link with a short name leads to a temporary folder whose own name is too long for the sockets in it."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TMPDIR:
        return
    name = f"flux_ray-{os.getuid()}-{hashlib.blake2b(os.fsencode(folder), digest_size=4).hexdigest()}"
    for place in SHORT_FOLDERS:
        link = Path(place, name)
        try:
            if not link.is_symlink():
                link.symlink_to(folder)
            if link.lstat().st_uid == os.getuid() and os.readlink(link) == folder:
                os.environ["TMPDIR"] = tempfile.tempdir = str(link)
                return
        except OSError:  # it isn't there, is read-only, or another process was quicker
            continue
    raise UserError(f"TMPDIR={folder} is too long for the sockets that Ray puts there: name a folder of at most "
                    f"{LONGEST_TMPDIR} bytes")


def _open_more_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        raise UserError(f"a process may open {soft} files here, a run needs {LEAST_OPEN_FILES}: raise the limit "
                        f"(ulimit -n {MOST_OPEN_FILES}; docker run --ulimit nofile={MOST_OPEN_FILES})")


def refuse_own_ray() -> None:
    """UserError where a Ray that is started from this environment would never answer."""
    for path in (sys.executable, *sys.path):
        if " " in path and (path == sys.executable or Path(path, "ray").is_dir()):
            raise UserError(f"the environment {sys.prefix!r} has a blank in its path, with which Ray doesn't start: "
                            "make it in another folder, or join a Ray that runs (cluster.address)")


def shared_memory_warning() -> str | None:
    """What a small /dev/shm costs, and how to get a larger one."""
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB if SHARED_MEMORY.is_dir() else 0.0
    if free >= LEAST_SHM_GIB:
        return None
    return (f"{SHARED_MEMORY} has {free:.2f} GiB free: Ray keeps its objects on disk, and weights travel by sockets, "
            f"which is slow; give it {LEAST_SHM_GIB:g} GiB or more (docker run --shm-size=2g)")
