"""From what ranks made of groups, and from dropped groups, to a step on disk."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from flux_ray.config import PolicyGradientConfig, changed
from flux_ray.messages import Assignment, GroupAt
from flux_ray.observability import rollouts
from flux_ray.records import Prompt, RolloutGroup, ScoredGroup, Trajectory
from flux_ray.rollout.owned import Carried
from flux_ray.rollout.rollout_files import RolloutFiles
from flux_ray.run.actors import trained_tokens

pytestmark = pytest.mark.unit


def carried(uid: int, *, lengths: tuple[int, ...] = (4, 6), evaluates: bool = False) -> Carried:
    prompt = Prompt(uid, uid, "1+1=", np.array([1, 2], np.int32), {}, len(lengths), 0)
    trajectories = tuple(Trajectory(np.arange(n, dtype=np.int32), np.arange(n) >= 2, np.zeros(n, np.float32),
                                    np.full(n, 3, np.int32), 2, "stop") for n in lengths)
    one = Carried(Assignment(prompt, 0, 1, len(lengths), evaluates=evaluates), start_s=0.0)
    one.parts, one.sample_engines = {0: (list(trajectories), 0)}, [1] * len(lengths)
    one.group, one.texts = RolloutGroup(prompt, trajectories), ("a", "b")
    ones = np.ones(len(lengths))
    one.scored = ScoredGroup(uid, ones, ones, {}, np.array(lengths), np.array(lengths) - 2, ones < 0, 3)
    one.reference = [np.full(n, -9, np.float32) for n in lengths]
    return one


def files_of(folder, **options) -> RolloutFiles:
    (folder / "config.yaml").write_text("")
    values = {"run_dir": str(folder), **{f"observability.{name}": value for name, value in options.items()}}
    return RolloutFiles(changed(PolicyGradientConfig(), values), worker=2)


def taken_back(of_worker: dict, *, share: float = 1.0, **more):
    """As a rank gives it: each sample's advantages are its uid."""
    groups = [one.group for one in of_worker.values()]
    places = [GroupAt(2, uid, attempt) for uid, attempt in of_worker]
    values = {"advantages": [np.full(t.num_tokens, g.prompt.uid, np.float32) for g in groups for t in g.trajectories],
              "old_logprobs": None, **more}
    return trained_tokens(places, groups, list(range(len(groups))), values, share=share)


def test_a_step_has_its_groups_and_those_dropped_meanwhile(tmp_path):
    of_worker = {(uid, 0): carried(uid, lengths=(4, 4 + uid)) for uid in (1, 2, 3)}
    kept = files_of(tmp_path)
    kept.dropped(carried(7), "all_equal")
    kept.dropped(carried(-1, evaluates=True), "reward_failed")
    (one,) = taken_back(of_worker)
    del of_worker[2, 0]  # its worker has begun it again meanwhile
    kept.trained(of_worker, one)
    written = asyncio.run(kept.write(5))
    assert written.num_bytes > 0 and not written.why_not
    rows = rollouts.read(tmp_path, 5).to_pylist()
    assert [(row["uid"], row["outcome"], row["update"]) for row in rows[::2]] == [
        (7, "all_equal", None), (1, "trained", 0), (3, "trained", 2)]
    assert rows[5]["advantages"] == [3.0] * 7 and rows[5]["reference_logprobs"] == [-9.0] * 7
    assert rows[5]["old_logprobs"] is None and rows[5]["engine"] == 1 and rows[5]["worker"] == 2
    assert asyncio.run(kept.write(6)).num_bytes == 0 and rollouts.steps(tmp_path) == [5]


def test_the_policy_without_its_adapter_is_the_rank_s_reference(tmp_path):
    of_worker = {(1, 0): carried(1)}
    kept = files_of(tmp_path)
    kept.trained(of_worker, *taken_back(of_worker, reference_logprobs=[np.full(n, -2, np.float32) for n in (4, 6)]))
    asyncio.run(kept.write(0))
    assert rollouts.read(tmp_path, 0)["reference_logprobs"][1].as_py() == [-2.0] * 6


def test_a_share_of_the_groups(tmp_path):
    of_worker = {(uid, 0): carried(uid) for uid in range(40)}
    kept = files_of(tmp_path, rollouts_share=0.5)
    for one in taken_back(of_worker, share=0.5):
        kept.trained(of_worker, one)
    for uid in range(40, 80):
        kept.dropped(carried(uid), "all_equal")
    asyncio.run(kept.write(0))
    uids = set(rollouts.read(tmp_path, 0)["uid"].to_pylist())
    assert uids == {uid for uid in range(80) if rollouts.is_kept(uid, 0.5)} and 35 <= len(uids) <= 45


def test_why_nothing_is_written(tmp_path):
    off = files_of(tmp_path, rollouts_max_gib=0.0)
    off.dropped(carried(1), "all_equal")
    assert asyncio.run(off.write(0)) == (0, "")
    unseen = files_of(tmp_path)
    (tmp_path / "config.yaml").unlink()
    unseen.dropped(carried(1), "all_equal")
    assert "doesn't see run_dir=" in asyncio.run(unseen.write(0)).why_not
    full = files_of(tmp_path)
    (tmp_path / rollouts.FOLDER).write_text("a file stands in the place of the folder")
    full.dropped(carried(1), "all_equal")
    assert "rollouts of step 0 can't be written" in asyncio.run(full.write(0)).why_not
