"""Small scored groups with everything ragged: lengths, rewards of both signs, a truncated sample, an empty response."""

from __future__ import annotations

import numpy as np

from flux_ray.records import (
    FINISH_LENGTH,
    FINISH_STOP,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Sample,
    ScoredGroup,
    Trajectory,
)


def rollout_group(uid: int, *, group_size: int = 4, version: int = 0, vocab: int = 64) -> RolloutGroup:
    rng = np.random.default_rng(uid)
    prompt_length = int(rng.integers(2, 6))
    prompt_ids = rng.integers(3, vocab, prompt_length).astype(np.int32)
    trajectories = []
    for i in range(group_size):
        length = 0 if uid == 1 and i == 0 else int(rng.integers(1, 12))
        ids = np.concatenate([prompt_ids, rng.integers(3, vocab, length).astype(np.int32)])
        mask = np.arange(len(ids)) >= prompt_length
        trajectories.append(Trajectory(
            ids, mask, np.where(mask, rng.normal(-4, 0.2, len(ids)), 0).astype(np.float32),
            np.where(mask, version, -1).astype(np.int32), prompt_length, FINISH_LENGTH if i == 3 else FINISH_STOP,
        ))
    prompt = Prompt(uid, uid, "", prompt_ids, {}, group_size, 0)
    return RolloutGroup(prompt, tuple(trajectories))


def scored(group: RolloutGroup) -> ScoredGroup:
    rewards = np.random.default_rng(group.prompt.uid + 100).normal(size=len(group.trajectories))
    return ScoredGroup(
        uid=group.prompt.uid, rewards=rewards, task_rewards=rewards, parts={},
        num_tokens=np.array([t.num_tokens for t in group.trajectories]),
        num_loss_tokens=np.array([t.num_loss_tokens for t in group.trajectories]),
        truncated=np.array([t.finish_reason == FINISH_LENGTH for t in group.trajectories]),
        oldest_version=min(t.oldest_version for t in group.trajectories),
    )


def reference_logprobs(group: RolloutGroup) -> list[np.ndarray]:
    rng = np.random.default_rng(group.prompt.uid + 200)
    return [np.where(t.loss_mask, rng.normal(-4, 0.2, t.num_tokens), 0).astype(np.float32) for t in group.trajectories]


def pairs(seed: int, count: int) -> list[PreferencePair]:
    """Ragged pairs with margins; some responses are a token long."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        prompt = rng.integers(3, 64, int(rng.integers(1, 6)))
        chosen, rejected = (np.concatenate([prompt, rng.integers(3, 64, int(rng.integers(1, 12)))]).astype(np.int32)
                            for _ in range(2))
        made.append(PreferencePair(row, len(prompt), chosen, rejected, float(rng.uniform(0, 1))))
    return made


def supervised(seed: int, count: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for length in rng.integers(3, 15, count):
        mask = np.arange(length) >= 2
        samples.append(Sample(rng.integers(3, 64, length).astype(np.int32), mask, np.zeros(length, np.float32)))
    return samples
