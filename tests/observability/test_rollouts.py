"""Rollouts on disk: what is written is read again, by us and by others; their bound; a kill."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flux_ray.errors import UserError
from flux_ray.observability import rollouts
from flux_ray.observability.rollouts import TRAINED, KeptRollouts, Rollout
from flux_ray.observability.run_folder import RunFolder
from flux_ray.records import Prompt, RolloutGroup, ScoredGroup, Trajectory

pytestmark = pytest.mark.unit


def trajectory(length: int, *, turns: int = 1) -> Trajectory:
    """Two prompt tokens; with two turns a tool's token stands between them."""
    mask = np.arange(length) >= 2
    mask[[3] * (turns - 1)] = False
    values = np.where(mask, -np.arange(length, dtype=np.float32) / 8, 0).astype(np.float32)
    return Trajectory(np.arange(length, dtype=np.int32), mask, values, np.where(mask, 7, -1).astype(np.int32), 2,
                      "length" if length > 5 else "stop")


def rollout(uid: int = 5, *, outcome: str = TRAINED, worker: int = 0) -> Rollout:
    prompt = Prompt(uid, 3, [{"role": "user", "content": "ü?"}], np.array([0, 1], np.int32), {}, 2, 11, "a")
    group = RolloutGroup(prompt, (trajectory(5), trajectory(6, turns=2)))
    scored = ScoredGroup(uid, np.array([1.0, math.nan]), np.array([0.5, math.nan]),
                         {"f": np.array([1.0, math.nan]), "f/x": np.array([0.25, 2.0])}, np.array([5, 6]),
                         np.array([3, 3]), np.array([False, True]), 7)
    made = {name: [t.sampler_logprobs * (k + 2) for t in group.trajectories]
            for k, name in enumerate(("advantages", "policy_logprobs", "entropies"))}
    is_trained = outcome == TRAINED
    return Rollout(group, 1, ["one", "two"], scored, outcome, worker, [0, 1], 2.0, 0.5, 0.25, 0 if is_trained else None,
                   {**made, "old_logprobs": None} if is_trained else None)


def test_rows_are_what_was_known(tmp_path):
    rollouts.write(tmp_path, 41, [rollout(), rollout(6, outcome="all_equal")])
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.parquet")] == [
        "rollouts/step=000041/000-0.parquet"]
    table = rollouts.read(tmp_path, 41)
    assert table.schema.equals(rollouts.SCHEMA) and rollouts.steps(tmp_path) == [41]
    first, second, dropped, _ = table.to_pylist()
    assert first["prompt"] == '[{"role": "user", "content": "ü?"}]' and first["response"] == "one"
    assert (first["uid"], first["attempt"], first["sample"], first["row"], first["data_set"]) == (5, 1, 0, 3, "a")
    assert first["token_ids"] == [0, 1, 2, 3, 4] and first["loss_mask"] == [False, False, True, True, True]
    assert first["advantages"] == [0, 0, -0.5, -0.75, -1] and first["advantage"] == -0.75
    assert first["old_logprobs"] is None and first["reference_logprobs"] is None
    assert second["parts"] == [{"key": "f", "value": None}, {"key": "f/x", "value": 2.0}] and second["reward"] is None
    assert (first["num_turns"], second["num_turns"], second["num_tokens"], second["truncated"]) == (1, 2, 3, True)
    assert dropped["outcome"] == "all_equal" and dropped["advantages"] is dropped["update"] is None


def test_groups_are_read_as_they_were(tmp_path):
    written = [rollout(), rollout(2)]
    rollouts.write(tmp_path, 0, written)
    two, five = rollouts.groups_of(rollouts.read(tmp_path, 0))
    assert (two.group.prompt.uid, five.group.prompt.uid) == (2, 5)
    for mine, theirs in zip(written[0].group.trajectories, five.group.trajectories, strict=True):
        for name in ("token_ids", "loss_mask", "sampler_logprobs", "versions"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
    np.testing.assert_array_equal(five.scored.rewards, written[0].scored.rewards)
    np.testing.assert_array_equal(five.scored.parts["f/x"], [0.25, 2.0])
    np.testing.assert_array_equal(five.made["policy_logprobs"][1], written[0].made["policy_logprobs"][1])
    # Entropies come back as their mean over the sampled tokens.
    mask = five.group.trajectories[1].loss_mask
    assert five.made["entropies"][1][mask] == pytest.approx(written[0].made["entropies"][1][mask].mean())


def test_others_read_them_as_they_are(tmp_path, monkeypatch):
    import datasets
    import pandas
    import pyarrow.dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for step in (0, 1):
        rollouts.write(tmp_path, step, [rollout(step), rollout(9, outcome="all_equal", worker=1)])
    (tmp_path / "rollouts" / "step=000001" / ".000-0.parquet.tmp").write_bytes(b"PAR1 half")
    folder = tmp_path / rollouts.FOLDER
    found = pyarrow.dataset.dataset(folder, partitioning="hive").to_table(
        filter=pyarrow.dataset.field("step") == 1, columns=["uid", "step"])
    assert found.to_pylist() == [{"uid": uid, "step": 1} for uid in (1, 1, 9, 9)]
    frame = pandas.read_parquet(folder)
    assert frame.groupby("step")["response"].count().to_dict() == {0: 4, 1: 4}
    assert list(frame["parts"][0]) == [{"key": "f", "value": 1.0}, {"key": "f/x", "value": 0.25}]
    loaded = datasets.load_dataset("parquet", data_files=str(folder / "**" / "*.parquet"), split="train",
                                   cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 8 and loaded[0]["token_ids"] == [0, 1, 2, 3, 4]


def test_older_steps_are_thinned_first(tmp_path):
    kept = KeptRollouts(tmp_path, max_gib=1e9)
    size = 0
    for step in range(16):
        size = rollouts.write(tmp_path, step, [rollout()])
        kept.written(step, size)
    assert rollouts.steps(tmp_path) == list(range(16))
    resumed = KeptRollouts(tmp_path, max_gib=16.5 * size / rollouts.GIB)  # it finds what is there
    for step in range(16, 32):
        resumed.written(step, rollouts.write(tmp_path, step, [rollout()]))
    left = rollouts.steps(tmp_path)
    assert len(left) == 16 and left[-8:] == list(range(24, 32)) and left[0] == 0
    older = np.diff(left[:8])
    assert older.max() >= 3 and list(older) == sorted(older, reverse=True), left


def test_one_step_stays_whatever_the_bound(tmp_path):
    kept = KeptRollouts(tmp_path, max_gib=1e-9)
    for step in range(3):
        kept.written(step, rollouts.write(tmp_path, step, [rollout()]))
    assert rollouts.steps(tmp_path) == [2]


def test_steps_that_come_again_are_taken_out(tmp_path):
    for step in range(4):
        rollouts.write(tmp_path, step, [rollout()])
    half = rollouts.step_folder(tmp_path, 1) / ".001-0.parquet.tmp"
    half.write_bytes(b"PAR1")
    RunFolder(tmp_path).cut(2)
    assert rollouts.steps(tmp_path) == [0, 1] and not half.exists()


def test_a_step_that_is_not_there_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no rollouts of step 3 are kept; it has none at all"):
        rollouts.read(tmp_path, 3)
    rollouts.write(tmp_path, 0, [rollout()])
    (rollouts.step_folder(tmp_path, 0) / "001-0.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(UserError, match=r"001-0\.parquet can't be read"):
        rollouts.read(tmp_path, 0)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_share_is_of_groups_and_even(share):
    kept = [rollouts.is_kept(uid, share) for uid in range(4000)]
    assert abs(sum(kept) / 4000 - share) < 0.01
    assert abs(sum(kept[:400]) / 400 - share) < 0.03


def test_nothing_half_is_left_where_the_disk_is_full(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    def full(table, where, **options):
        Path(where).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        rollouts.write(tmp_path, 0, [rollout()])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


WRITER = """
import sys
from tests.observability.test_rollouts import rollout
from flux_ray.observability import rollouts
step = 0
while True:
    rollouts.write(sys.argv[1], step, [rollout(uid) for uid in range(200)])
    step += 1
"""


@pytest.mark.system
def test_a_kill_leaves_whole_files_only(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        end = time.monotonic() + 60
        while len(rollouts.steps(tmp_path)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.wait(10)
    steps = rollouts.steps(tmp_path)
    assert len(steps) >= 3
    assert all(rollouts.read(tmp_path, step).num_rows == 400 for step in steps[:-1])
    assert rollouts.read(tmp_path, steps[-1]).num_rows % 128 in (0, 16)  # 64 groups a file, the last one has 8
