"""Finished groups on disk, in a checkpoint: what a resumed run need not sample again.

Takes:  groups that are sampled, scored and referenced.
Gives:  `write`, one safetensors file of them all; `read`, the groups of some prompts.
Never:  writes a prompt: a resumed run has it from its data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from flux_ray.records import Prompt, RolloutGroup, ScoredGroup, Trajectory

PER_TOKEN = ("token_ids", "loss_mask", "sampler_logprobs", "versions")


@dataclass(frozen=True)
class KeptArrays:
    """All that a rollout worker owns of a finished group."""

    group: RolloutGroup
    step: int  # updates that the newest policy among its tokens had
    texts: tuple[str, ...]
    scored: ScoredGroup
    reference: list[np.ndarray] | None  # (T,) float32 of each trajectory; None where no KL is asked for
    engines: list[int]  # of each sample
    seconds: tuple[float, float, float]  # to generate, score and reference it


def write(file: Path, groups: Sequence[KeptArrays]) -> None:
    """What raises leaves no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    trajectories = [trajectory for one in groups for trajectory in one.group.trajectories]
    arrays = {name: np.concatenate([getattr(one, name) for one in trajectories]) for name in PER_TOKEN}
    arrays["loss_mask"] = arrays["loss_mask"].astype(np.uint8)
    references = [logprobs for one in groups for logprobs in one.reference or ()]
    if references:
        arrays["reference"] = np.concatenate(references)
    experts = [one.experts for one in trajectories if one.experts is not None]
    if experts:
        arrays["experts"] = np.concatenate(experts)
    try:
        save_file(arrays, file, metadata={"groups": json.dumps([_described(one) for one in groups])})
        with file.open("rb") as written:
            os.fsync(written.fileno())
    except BaseException:
        file.unlink(missing_ok=True)  # a part of a file would spoil the whole checkpoint
        raise


def _described(one: KeptArrays) -> dict[str, Any]:
    scored = one.scored
    return {
        "uid": scored.uid, "step": one.step, "texts": one.texts, "referenced": one.reference is not None,
        "trajectories": [(t.num_tokens, t.prompt_length, t.finish_reason) for t in one.group.trajectories],
        "experts": [None if t.experts is None else len(t.experts) for t in one.group.trajectories],
        "rewards": scored.rewards.tolist(), "task_rewards": scored.task_rewards.tolist(),
        "parts": {name: values.tolist() for name, values in scored.parts.items()},
        "truncated": scored.truncated.tolist(), "oldest_version": scored.oldest_version,
        "engines": one.engines, "seconds": one.seconds,
    }


def read(file: Path, prompts: Sequence[Prompt]) -> list[KeptArrays]:
    """The groups of these prompts, those that the file has. A group of another size than its prompt's is left out."""
    with safe_open(file, framework="np") as stored:
        described = json.loads(stored.metadata()["groups"])
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 it is no dict
    arrays["loss_mask"] = arrays["loss_mask"].astype(bool)
    of_uid, found = {prompt.uid: prompt for prompt in prompts}, []
    start = reference_start = experts_start = 0
    for group in described:
        lengths = [length for length, *_ in group["trajectories"]]
        rows = group.get("experts", [None] * len(lengths))
        ends = experts_start + np.cumsum([of_sample or 0 for of_sample in rows])
        experts = [None if num is None else arrays["experts"][end - num : end]
                   for num, end in zip(rows, ends.tolist(), strict=True)]
        prompt = of_uid.get(group["uid"])
        if prompt is not None and prompt.num_samples == len(lengths):
            found.append(_group(group, prompt, arrays, (start, reference_start), experts))
        start += sum(lengths)
        reference_start += sum(lengths) if group["referenced"] else 0
        experts_start = int(ends[-1])
    return found


def _group(described: dict[str, Any], prompt: Prompt, arrays: dict[str, np.ndarray], starts: tuple[int, int],
           experts: Sequence[np.ndarray | None]) -> KeptArrays:
    start, reference_start = starts
    ends = np.cumsum([length for length, *_ in described["trajectories"]])
    columns = {name: np.split(arrays[name][start : start + ends[-1]], ends[:-1]) for name in PER_TOKEN}
    trajectories = tuple(
        Trajectory(**{name: rows[i] for name, rows in columns.items()}, prompt_length=prompt_length,
                   finish_reason=finish_reason, experts=experts[i])
        for i, (_, prompt_length, finish_reason) in enumerate(described["trajectories"]))
    reference = None
    if described["referenced"]:
        reference = np.split(arrays["reference"][reference_start : reference_start + ends[-1]], ends[:-1])
    parts = {name: np.array(values, np.float64) for name, values in described["parts"].items()}
    scored = ScoredGroup(
        prompt.uid, np.array(described["rewards"], np.float64), np.array(described["task_rewards"], np.float64), parts,
        num_tokens=np.array([t.num_tokens for t in trajectories]),
        num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
        truncated=np.array(described["truncated"], bool), oldest_version=described["oldest_version"])
    return KeptArrays(RolloutGroup(prompt, trajectories), described["step"], tuple(described["texts"]), scored,
                      reference, described["engines"], tuple(described["seconds"]))
