"""A plugin that every process of a measured run imports: what can't be told from outside.

Takes:  BENCH_CORES (role and index ► cores, as JSON) and BENCH_NOTES (a folder) from the environment.
Gives:  `forced` and `watched`, rollouts whose responses have the row's `lengths`; notes, a JSON line each.
Knows:  which actor this process is by the file that its output goes to.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from flux_ray.data.order import stable_seed
from flux_ray.data.prompts import TRAIN
from flux_ray.records import Completion, Prompt, Trajectory
from flux_ray.rollout.functions import Generate, one_turn

CORES, NOTES = "BENCH_CORES", "BENCH_NOTES"
SEED = 0  # of every measured run
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


async def forced(prompt: Prompt, generate: Generate) -> list[Trajectory]:
    """Sample i of the row has lengths[i] tokens. Where all are alike, one request for the group, as single_turn."""
    lengths = lengths_of(prompt)
    if len(set(lengths)) == 1:
        completions = await generate(prompt.token_ids, n=len(lengths), max_tokens=lengths[0])
    else:
        completions = [one for (one,) in await asyncio.gather(*(
            generate(prompt.token_ids, sample=i, max_tokens=length) for i, length in enumerate(lengths)))]
    return [one_turn(prompt, completion) for completion in completions]


async def watched(prompt: Prompt, generate: Generate) -> list[Trajectory]:
    """As `forced`; the first sample is streamed, and each of its tokens noted with time and version.

    Only the first few tokens are trained on: the trainer is done while engines generate, and updates find requests that
    run, as many each time.
    """
    lengths = lengths_of(prompt)
    first, rest = await asyncio.gather(
        _streamed(generate._engine, prompt, lengths[0]),  # type: ignore[attr-defined]
        asyncio.gather(*(generate(prompt.token_ids, sample=i, max_tokens=length)
                         for i, length in enumerate(lengths) if i)))
    return [one_turn(prompt, _begun(completion)) for completion in (first, *(one for (one,) in rest))]


def _begun(completion: Completion) -> Completion:
    return Completion(completion.token_ids[:KEPT], completion.logprobs[:KEPT], completion.versions[:KEPT], "length")


async def _streamed(engine: Any, prompt: Prompt, length: int) -> Completion:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from flux_ray.rollout.engine import completion_of

    params = SamplingParams(seed=prompt.seed, max_tokens=length, ignore_eos=True, logprobs=0, flat_logprobs=True,
                            detokenize=False, output_kind=RequestOutputKind.CUMULATIVE)
    tokens, times_s, final = {"prompt_token_ids": prompt.token_ids.tolist()}, [], None
    async for final in engine._engine.generate(tokens, params, f"watched-{prompt.uid}-{prompt.seed}"):
        new = len(final.outputs[0].token_ids) - len(times_s)
        times_s += [time.monotonic()] * new
    assert final is not None
    completion = completion_of(final.outputs[0])
    note(times_s=times_s, versions=completion.versions.tolist())
    return completion


def lengths_of(prompt: Prompt) -> list[int]:
    """Of the samples of this prompt, or of this part of a group."""
    first = prompt.seed - stable_seed(SEED, TRAIN, prompt.uid)
    return prompt.columns["lengths"][first : first + prompt.num_samples]


def count_tokens() -> None:
    """In a training rank: after each optimizer step a note of the tokens that were forwarded with gradients, and of
    those among them that are of samples (not padding, and not a micro-batch without weight)."""
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
        note(forwarded=sum(forwarded), used=sum(used), scored=sum(scored), micro_batches=len(forwarded))
        for counts in (forwarded, used, scored):
            counts.clear()

    PolicyModel.forward = counted  # type: ignore[method-assign]
    register_optimizer_step_post_hook(stepped)


if NOTES in os.environ:
    of_actor = json.loads(os.environ.get(CORES, "{}")).get(actor())
    if of_actor:
        stay_on(of_actor)
    if actor().startswith("trainer-"):
        count_tokens()
