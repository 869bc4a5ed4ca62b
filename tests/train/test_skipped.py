"""Numbers that are not finite, planted on one of two ranks: all ranks do alike; nothing wrong is learned or given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train.batches import rollout_group
from tests.train.scenarios import SECOND
from tests.train.skip_scenarios import LEFT_OUT

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_not_finite_is_left_out_by_every_rank(folder: Path, two: dict, kind: str) -> None:
    """Weights, masters, moments and schedule stay, to the bit; the next step is as if nothing had been."""
    for stayed, updates, same, step, metrics in two["left_out"][kind]["ranks"]:
        assert (stayed, updates, same, step) == (True, 1, True, 2)
        assert metrics["train/skipped"] == 1.0
        assert not {"actor/loss", "train/grad_norm", "train/learning_rate"} & metrics.keys()
    assert two["left_out"][kind]["went_on"]["train/skipped"] == 0.0
    kept = folder / f"run_{kind}" / "bad_batches"
    told = json.loads((kept / "step-000002-trainer.json").read_text())
    assert told == {"step": 2, "skipped": [{"update": 1, "why": "the reference's log-probs on rank 1"}]}
    shares = [load_file(kept / f"step-000002-trainer-rank-{rank}.safetensors") for rank in (0, 1)]
    groups = [rollout_group(uid, version=1) for uid in SECOND]
    assert sorted(uid for share in shares for uid in share["group_uids"].tolist()) == sorted(SECOND)
    assert sum(len(share["0.token_ids"]) for share in shares) == sum(
        len(trajectory.token_ids) for group in groups for trajectory in group.trajectories)
    assert sum(len(share["rewards"]) for share in shares) == sum(len(group.trajectories) for group in groups)
    assert [bool(share["0.reference_logprobs"].isnan().any()) for share in shares] == [False, True]


def test_weights_that_are_not_finite_are_given_to_nobody(folder: Path, two: dict) -> None:
    for said in two["says"]:
        for of_stage in said.values():
            assert len(of_stage) == 3
            assert all(line.startswith("after 0 updates the weight ") and "not finite" in line for line in of_stage)
            assert len(set(of_stage)) == 1
    assert not [path for stage in (0, 3) for path in folder.glob(f"*spoilt_{stage}*")]
