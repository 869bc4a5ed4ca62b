"""On a CPU vLLM's engine core is forked from a process that imports vLLM while the actor does: it starts twice as fast.

Takes:  nothing; vLLM asks for the process when it wants one.
Gives:  `fork_engine_core`.
Knows:  vLLM itself starts an interpreter after the actor has imported everything, which imports everything again. It
        forks nothing in an actor of Ray's, which has threads; the process here has none.
Never:  lets the engine core have another environment than vLLM made for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOAD = "flux_ray.rollout.cpu_startup.preload"


def fork_engine_core() -> None:
    """From now on a process imports vLLM, and so does this one; the engine cores of this one are forked from that."""
    forkserver.set_forkserver_preload([PRELOAD])
    try:
        forkserver.ensure_running()
    except OSError as error:  # such as a folder for temporary files whose path is too long for a socket
        logging.getLogger(__name__).warning("vLLM starts its engine core by itself, which takes longer: %s", error)
        return
    import_module(PRELOAD)
    import vllm.v1.engine.utils as engine_utils

    as_vllm_would, preloads = engine_utils.get_mp_context, _preloads()

    def context() -> Any:
        return _Forking() if _preloads() == preloads else as_vllm_would()

    engine_utils.get_mp_context = context


def _preloads() -> set[str]:
    """What the dynamic linker puts before all else: in a forked process it can't any more. libgomp is there already."""
    return {library for library in os.environ.get("LD_PRELOAD", "").split(":") if library and "libgomp" not in library}


class _Forking(ForkServerContext):
    """multiprocessing's context whose processes have the environment of the one that asks for them."""

    def Process(self, *, target: Callable[..., None], name: str, kwargs: dict[str, Any]) -> Any:  # type: ignore[override]
        return super().Process(target=_in_environment, args=(dict(os.environ), target), name=name, kwargs=kwargs)


def _in_environment(environment: dict[str, str], target: Callable[..., None], **kwargs: Any) -> None:
    with contextlib.suppress(ImportError):
        import setproctitle  # vLLM names its processes by it: it finds their name by the environment's place in memory

        setproctitle.getproctitle()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    target(**kwargs)
