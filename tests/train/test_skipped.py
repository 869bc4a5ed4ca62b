"""Numbers that are not finite, planted on one of two ranks: all ranks do alike; nothing wrong is learned or given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flux_ray.__main__ import main
from flux_ray.config import to_yaml
from tests.train.batches import rollout_group
from tests.train.scenarios import SECOND, Rank
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


def test_the_command_of_the_warning_says_which_sequences_and_which_numbers(folder: Path, two: dict, capsys) -> None:
    """The last group of rank 1, the only one with a reference that isn't finite; under whatever weights there are.
    The second time in one process gives the same: nothing of the first is left in it."""
    run = folder / "run_zero_0"
    config = Rank(1, 0, folder, 0).config("tied", {})
    (run / "config.yaml").write_text(to_yaml(config))
    assert main(["replay", str(run), "--step", "1", "--left-out"]) == 0
    told = capsys.readouterr().out
    assert main(["replay", str(run), "--step", "1", "--left-out"]) == 0
    assert capsys.readouterr().out == told
    first, second, *sequences, last = told.splitlines()
    assert first == "step 1, update 1: the reference's log-probs on rank 1"
    assert second == "with the weights of model.path, the nearest before (after 0 steps, not 1):"
    assert len(sequences) == len(rollout_group(SECOND[-1], version=1).trajectories)
    assert all(line.startswith("rank 1, its sequence ") and "not finite: reference_logprobs at " in line
               and "log-probs of" not in line for line in sequences), sequences
    assert last == "the gradient is not finite"
    assert main(["replay", str(run), "--step", "7", "--left-out"]) == 2
    assert capsys.readouterr().err.strip().endswith("nothing is kept of step 7; there are steps [1]")


def test_weights_that_are_not_finite_are_given_to_nobody(folder: Path, two: dict) -> None:
    for said in two["says"]:
        for of_stage in said.values():
            assert len(of_stage) == 3
            assert all(line.startswith("after 0 updates the weight ") and "not finite" in line for line in of_stage)
            assert len(set(of_stage)) == 1
    assert not [path for stage in (0, 3) for path in folder.glob(f"*spoilt_{stage}*")]
