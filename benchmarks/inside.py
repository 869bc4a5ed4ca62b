"""A plugin that every process of a measured run imports: what can't be told from outside.

Takes:  BENCH_CORES (role and index ► cores, as JSON), BENCH_NOTES (a folder), BENCH_MEMORY (watched | alone), from the
        environment.
Gives:  engines whose responses have the row's `lengths`; notes, a JSON line each.
Knows:  which actor this process is by the file that its output goes to.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux_ray.data.order import stable_seed
from flux_ray.data.prompts import TRAIN
from flux_ray.records import Completion, Sampled, SamplingRequest

CORES, NOTES, WATCHED, MEMORY = "BENCH_CORES", "BENCH_NOTES", "BENCH_WATCHED", "BENCH_MEMORY"
ALONE = "alone"  # of BENCH_MEMORY: an update finds no shared memory, as on a machine without engines
LOOK_EVERY_S = 0.002  # at this process's memory
EPOCHS = 2  # an asynchronous run starts prompts that it does not train on
KEPT = 8  # tokens of a watched response that are trained on


def actor() -> str:
    """`engine-0`, `trainer-1` …: the name of the file that an actor's output goes to."""
    return Path(os.readlink("/proc/self/fd/1")).stem


def note(**values: Any) -> None:
    """A line with the time (of all processes the same clock), appended to this actor's file."""
    with Path(os.environ[NOTES], f"{actor()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at_s": time.monotonic(), **values}) + "\n")


def stay_on(cores: list[int]) -> None:
    """All threads that there are, and with them those that they start, and their processes."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def lengths_of(config: Any) -> dict[int, int]:
    """Seed of a sample ► tokens of its response, as the rows' `lengths` have it. A run goes over its rows in order."""
    rows = [json.loads(line)["lengths"] for line in Path(config.data.train).read_text().splitlines()]
    uids = range(EPOCHS * len(rows))
    return {stable_seed(config.seed, TRAIN, uid) + i: length
            for uid in uids for i, length in enumerate(rows[uid % len(rows)])}


def force_lengths() -> None:
    """In an engine: each response gets its row's length. With BENCH_WATCHED the first sample of each request is
    streamed, each of its tokens noted with time and version, and only the first few tokens of a response are trained
    on: the trainer is done while engines generate, and updates find requests that run, as many each time.
    """
    from flux_ray.rollout.engine import RolloutEngine

    generate = RolloutEngine.generate
    lengths: dict[int, int] = {}
    watched = bool(os.environ.get(WATCHED))

    async def sample(engine: RolloutEngine, request: SamplingRequest, is_first: bool) -> Sampled:
        if watched and is_first:
            return Sampled((await _streamed(engine, request),), 0)
        return await generate(engine, request)

    async def forced(self: RolloutEngine, request: SamplingRequest) -> Sampled:
        if request.probes:
            return await generate(self, request)
        if not lengths:
            lengths.update(lengths_of(self._config))
        wanted = [lengths[request.seed + i] for i in range(request.n)]
        if len(set(wanted)) == 1 and not watched:  # one request for the group, as it came
            return await generate(self, replace(request, max_tokens=wanted[0]))
        each = await asyncio.gather(*(
            sample(self, replace(request, n=1, seed=request.seed + i, max_tokens=length), i == 0)
            for i, length in enumerate(wanted)))
        completions = tuple(_begun(sampled.completions[0]) if watched else sampled.completions[0] for sampled in each)
        return Sampled(completions, max(sampled.step for sampled in each))

    RolloutEngine.generate = forced  # type: ignore[method-assign]


def _begun(completion: Completion) -> Completion:
    return Completion(completion.token_ids[:KEPT], completion.logprobs[:KEPT], completion.versions[:KEPT], "length")


async def _streamed(engine: Any, request: SamplingRequest) -> Completion:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from flux_ray.rollout.engine import completion_of

    params = SamplingParams(seed=request.seed, max_tokens=request.max_tokens, ignore_eos=True, logprobs=0,
                            flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.CUMULATIVE)
    tokens = {"prompt_token_ids": request.token_ids.tolist()}
    times_s: list[float] = []
    final = None
    async for final in engine._engine.generate(tokens, params, f"watched-{request.seed}"):
        new = len(final.outputs[0].token_ids) - len(times_s)
        times_s += [time.monotonic()] * new
    assert final is not None
    completion = completion_of(final.outputs[0], prompt_length=len(request.token_ids))
    note(times_s=times_s, versions=completion.versions.tolist())
    return completion


def count_tokens() -> None:
    """In a training rank: after each optimizer step a note of the tokens that were forwarded with gradients, and of
    those among them that are of samples (not padding, and not a micro-batch without weight); with it the most memory
    that the rank has had on its GPU."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from flux_ray.model.policy import PolicyModel

    forwarded, used, scored = [], [], []
    forward = PolicyModel.forward

    def counted(self: PolicyModel, micro_batch: Any, **asked: Any) -> Any:
        tokens = micro_batch.num_padded_tokens if self.layout == "padded" else micro_batch.num_tokens
        if torch.is_grad_enabled():
            forwarded.append(tokens)
            used.append(micro_batch.num_tokens if bool(micro_batch.loss_mask_S.any()) else 0)
        else:
            scored.append(tokens)
        return forward(self, micro_batch, **asked)

    def stepped(*_: Any) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        note(forwarded=sum(forwarded), used=sum(used), scored=sum(scored), micro_batches=len(forwarded),
             peak_gpu_bytes=peak)
        for counts in (forwarded, used, scored):
            counts.clear()

    PolicyModel.forward = counted  # type: ignore[method-assign]
    register_optimizer_step_post_hook(stepped)


def resident_bytes() -> tuple[int, int]:
    """This process's own memory, and what it has of memory that others see too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    own, shared = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return own, shared


def read_notes(folder: Path, name: str) -> list[dict[str, Any]]:
    """What an actor of a part has noted."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def watch_memory() -> None:
    """In a training rank: a note of how far its memory grew while it published, at most, and of what others see too."""
    from flux_ray.weights import sender
    from flux_ray.weights.publish import Publisher

    publish = Publisher.publish
    if os.environ[MEMORY] == ALONE:
        sender.create_memory = lambda num_bytes: None  # type: ignore[assignment]

    def watched(self: Publisher, *given: Any) -> Any:
        before, largest, done = resident_bytes(), [0, 0], threading.Event()

        def look() -> None:
            while not done.wait(LOOK_EVERY_S):
                largest[:] = [max(pair) for pair in zip(largest, resident_bytes(), strict=True)]

        thread = threading.Thread(target=look)
        thread.start()
        try:
            return publish(self, *given)
        finally:
            done.set()
            thread.join()
            note(own_bytes=largest[0] - before[0], shared_bytes=largest[1])

    Publisher.publish = watched  # type: ignore[method-assign, assignment]


if NOTES in os.environ:
    of_actor = json.loads(os.environ.get(CORES, "{}")).get(actor())
    if of_actor:
        stay_on(of_actor)
    if actor().startswith("trainer-"):
        count_tokens()
        if MEMORY in os.environ:
            watch_memory()
    if actor().startswith("engine-"):
        force_lengths()
