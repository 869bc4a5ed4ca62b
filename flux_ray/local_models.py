"""A model that answers in this process, for commands that need neither Ray nor a run's folder.

Takes:  what `sampling_config_for` gives.
Gives:  `opened`: its engine and tokenizer, while the block lasts.
Never:  lets a library's lines onto the terminal: they go to a log, whose name a failure tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import RunFailed, UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model import load_tokenizer
from flux_ray.observability.terminal import quiet
from flux_ray.rollout.local import LocalEngine, local_engine


@contextlib.asynccontextmanager
async def opened(config: PolicyGradientConfig) -> AsyncIterator[tuple[LocalEngine, Tokenizer]]:
    """The engine, started, and the model's tokenizer. RunFailed, with the log, where vLLM doesn't start."""
    tokenizer = load_tokenizer(config.model.tokenizer or str(config.model.path))
    engine = local_engine(config)
    number, name = tempfile.mkstemp(prefix="flux-ray-", suffix=".log")
    os.close(number)
    log = Path(name)
    try:
        with quiet(log, progress=False):
            await engine.start()
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise RunFailed(f"vLLM doesn't start with {config.model.path}: {text} (log: {log})") from error
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        yield engine, tokenizer
    finally:
        with quiet(log, progress=False):
            await engine.close()
        with contextlib.suppress(OSError):
            os.remove(log)
