"""Finished groups on disk: what is read is what was written."""

from __future__ import annotations

import numpy as np
import pytest

from flux_ray.records import Prompt, RolloutGroup, ScoredGroup, Trajectory
from flux_ray.rollout.kept import KeptArrays, read, write

pytestmark = pytest.mark.unit


def trajectory(length: int, prompt_length: int, seed: int) -> Trajectory:
    chance = np.random.default_rng(seed)
    mask = np.arange(length) >= prompt_length
    mask[-1:] &= seed % 2 == 0  # a tool's token
    return Trajectory(chance.integers(0, 99, length, np.int32), mask,
                      np.where(mask, chance.normal(size=length), 0).astype(np.float32),
                      np.where(mask, 7 + seed, -1).astype(np.int32), prompt_length, "stop" if seed % 2 else "length",
                      None if seed % 3 == 0 else chance.integers(0, 256, (length - 1, 4, 2), np.uint8))


def group(uid: int, *, referenced: bool) -> KeptArrays:
    prompt = Prompt(uid, uid % 3, f"{uid}+1=", np.array([1, 2], np.int32), {"answer": "x"}, 3, 100 * uid)
    trajectories = tuple(trajectory(5 + uid + i, 2, uid + i) for i in range(3))
    rewards = np.array([1.0, np.nan, 1 / 3])
    scored = ScoredGroup(uid, rewards, rewards, {"right": rewards, "/failed": np.array([0.0, 1.0, 0.0])},
                         np.array([t.num_tokens for t in trajectories]),
                         np.array([t.num_loss_tokens for t in trajectories]), np.array([True, False, True]), 7)
    reference = [np.random.default_rng(i).normal(size=t.num_tokens).astype(np.float32)
                 for i, t in enumerate(trajectories)] if referenced else None
    texts = ("a", "\U0001f600 \"quoted\"", "")
    return KeptArrays(RolloutGroup(prompt, trajectories), 6, texts, scored, reference, [0, 0, 1], (1.5, 0.25, 0.0))


def assert_same(one: KeptArrays, other: KeptArrays) -> None:
    for name in ("step", "texts", "engines", "seconds"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.group.prompt == other.group.prompt
    for a, b in zip(one.group.trajectories, other.group.trajectories, strict=True):
        for name in ("token_ids", "loss_mask", "sampler_logprobs", "versions"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and np.array_equal(x, y), name
        assert (a.prompt_length, a.finish_reason) == (b.prompt_length, b.finish_reason)
        assert (a.experts is None) == (b.experts is None)
        assert a.experts is None or (a.experts.dtype == b.experts.dtype and np.array_equal(a.experts, b.experts))
    assert (one.reference is None) == (other.reference is None)
    for x, y in zip(one.reference or (), other.reference or (), strict=True):
        assert np.array_equal(x, y)
    scored, read_again = one.scored, other.scored
    assert scored.oldest_version == read_again.oldest_version and list(scored.parts) == list(read_again.parts)
    for name in ("rewards", "task_rewards", "num_tokens", "num_loss_tokens", "truncated"):
        assert np.array_equal(getattr(scored, name), getattr(read_again, name), equal_nan=name.endswith("rewards"))


@pytest.mark.parametrize("referenced", [True, False])
def test_what_is_written_is_read_again(tmp_path, referenced):
    groups = [group(uid, referenced=referenced) for uid in (4, 0, 9)]
    write(tmp_path / "rollout" / "0.safetensors", groups)
    found = read(tmp_path / "rollout" / "0.safetensors", [one.group.prompt for one in groups])
    assert len(found) == 3
    for one, other in zip(groups, found, strict=True):
        assert_same(one, other)


def test_only_the_groups_that_are_asked_for_and_none_of_another_size(tmp_path):
    groups = [group(uid, referenced=True) for uid in (4, 5, 6)]
    write(tmp_path / "0.safetensors", groups)
    larger = Prompt(5, 0, "", np.array([1, 2], np.int32), {}, 8, 0)
    (found,) = read(tmp_path / "0.safetensors", [groups[2].group.prompt, larger])
    assert_same(groups[2], found)


def test_what_can_t_be_written_leaves_nothing(tmp_path):
    broken = group(1, referenced=True)
    broken.scored.parts["odd"] = np.array([object()])  # no JSON
    with pytest.raises(TypeError):
        write(tmp_path / "0.safetensors", [broken])
    assert list(tmp_path.iterdir()) == []
