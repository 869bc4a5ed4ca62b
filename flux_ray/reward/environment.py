"""What users' rewards find around them in their child process.

Takes:  the variables that reward.env names; the folder in which the run was started.
Gives:  `clean`: the environment without secrets; `link`: the folder's files; `Kept`: both again after each call.
Knows:  a temporary folder is current. Links lead to the files of the other one, so that what is opened by its name is
        found, and what is made anew is gone with the process.
Never:  keeps out who looks for secrets: a process may read what others of the same user hold.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from flux_ray.secrecy import is_secret

#: Variables that get through, by their names or the beginnings of their names.
HARMLESS = frozenset({"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "TMPDIR",
                      "VIRTUAL_ENV", "HF_HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SSL_CERT_DIR",
                      "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"})
HARMLESS_BEGINNINGS = ("LC_", "PYTHON", "CONDA_", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "KMP_", "CUDA_", "NVIDIA_",
                       "HF_HUB_", "HF_DATASETS_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "NLTK_", "XDG_")
WITH_PASSWORD = re.compile(r"://[^/]*@")  # in a URL

MOST_LINKS = 1000  # of a folder with more entries the first are linked


def clean(wanted: Mapping[str, str]) -> None:
    """Only harmless variables stay, and those that are wanted are added."""
    for name, value in list(os.environ.items()):
        if not _is_harmless(name, value):
            del os.environ[name]
    os.environ.update(wanted)


def _is_harmless(name: str, value: str) -> bool:
    known = name.upper() in HARMLESS or name.startswith(HARMLESS_BEGINNINGS)
    return known and not is_secret(name) and not WITH_PASSWORD.search(value)


def link(folder: Path, *, but: Path | None) -> None:
    """Links in the current folder to what is in `folder`. None where that is `but`, or lies in it: a run's folder."""
    if but is not None and folder.resolve().is_relative_to(but.resolve()):
        return
    with contextlib.suppress(OSError):
        for entry in sorted(folder.iterdir())[:MOST_LINKS]:
            with contextlib.suppress(OSError):
                Path(entry.name).symlink_to(entry)


class Kept:
    """A context of a call: the current folder and the variables are put back after it.

    Where async calls run side by side, the last one to end puts them back.
    """

    def __init__(self) -> None:
        self._num_running = 0
        self._folder, self._variables = "", dict[str, str]()

    def __enter__(self) -> None:
        if not self._num_running:
            self._folder, self._variables = os.getcwd(), dict(os.environ)
        self._num_running += 1

    def __exit__(self, *raised: object) -> None:
        self._num_running -= 1
        if self._num_running:
            return
        with contextlib.suppress(OSError):  # the call has removed it
            os.chdir(self._folder)
        if dict(os.environ) != self._variables:
            os.environ.clear()
            os.environ.update(self._variables)
