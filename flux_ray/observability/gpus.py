"""Memory and utilisation of the GPUs of the driver's machine, as nvidia-smi tells them.

Takes:  nothing.
Gives:  `Gpus`: `watch` asks every few seconds; `step_metrics` are those since the last step, empty without a GPU.
Knows:  a run goes on where nvidia-smi fails, or hangs: it is asked no more.
Never:  opens a GPU in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil

from flux_ray.observability.described import Described

log = logging.getLogger(__name__)

EVERY_S = 5.0
DEADLINE_S = 10.0  # of one answer
ASK = ("--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")
OVER = "GPUs of the driver's machine, asked every five seconds"

METRICS = (
    Described("gpu/utilisation", "mean share of the time in which a GPU was at work", "1", OVER, "",
              "low: what the step waits for is elsewhere (the trace of a step, `observability.trace_steps`)"),
    Described("gpu/memory_gib", "the most memory in use on any of them", "GiB", OVER, "below the GPU's own",
              "near it: a smaller `rollout.engine_args.gpu_memory_utilization` or `batch.max_tokens_per_micro_batch`"),
)


class Gpus:
    def __init__(self) -> None:
        self._answers: list[tuple[float, float]] = []  # since the last step: share at work, GiB; of each GPU

    async def watch(self) -> None:
        """Until it is cancelled; at once over where there is no nvidia-smi, or where it fails."""
        program = shutil.which("nvidia-smi")
        while program:
            try:
                self._answers += await _asked(program)
            except (OSError, ValueError, TimeoutError) as error:
                log.warning("nvidia-smi is asked no more: %s: %s", type(error).__name__, error)
                return
            await asyncio.sleep(EVERY_S)

    def step_metrics(self) -> dict[str, float]:
        answers, self._answers = self._answers, []
        if not answers:
            return {}
        return {"gpu/utilisation": sum(share for share, _ in answers) / len(answers),
                "gpu/memory_gib": max(gib for _, gib in answers)}


async def _asked(program: str) -> list[tuple[float, float]]:
    """(Share of the time at work, GiB in use) of each GPU. ValueError for an answer that isn't two numbers a line."""
    process = await asyncio.create_subprocess_exec(
        program, *ASK, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(DEADLINE_S):
            written, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        raise ValueError(f"exit code {process.returncode}")
    lines = [line.split(",") for line in written.decode().splitlines()]
    return [(float(share) / 100, float(mib) / 1024) for share, mib in lines]
