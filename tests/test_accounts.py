"""The accounts of a run's prompts, and what `flux-ray audit` finds in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_ray import __main__ as cli
from flux_ray.accounts import Account, as_line, audited, spans, uids_of
from flux_ray.audit import audit, told
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

START = as_line(-1, Account(0))
STEPS = [
    as_line(0, Account(5, pending=(3, 4), trained=(0, 1), dropped={"same_reward": (2,)})),
    as_line(1, Account(7, pending=(6,), trained=(3, 5), dropped={"reward_failed": (4,)})),
]


@pytest.mark.parametrize("uids", [(), (3,), (0, 1, 2, 5, 9, 10)])
def test_spans_hold_what_they_were_made_from(uids):
    assert tuple(uids_of(spans(reversed(uids)))) == uids


def test_every_prompt_ends_once_or_is_pending():
    sums = audited([START, *STEPS])
    assert sums.is_clean
    assert (sums.num_steps, sums.drawn, sums.trained, sums.pending) == (2, 7, 4, 1)
    assert sums.dropped == {"same_reward": 1, "reward_failed": 1}


def test_a_run_that_goes_on_from_another_ones_checkpoint_begins_with_what_was_pending():
    sums = audited([as_line(9, Account(40, pending=(31, 38))), as_line(10, Account(41, trained=(31, 38, 40)))])
    assert sums.is_clean and (sums.first_step, sums.num_steps, sums.drawn) == (10, 11, 3)


@pytest.mark.parametrize(("line", "lost", "twice"), [
    (as_line(2, Account(8, pending=(7,))), [6], []),
    (as_line(2, Account(8, pending=(6,))), [7], []),
    (as_line(2, Account(7, pending=(), trained=(6, 3))), [], [3]),
    (as_line(2, Account(7, pending=(6,), trained=(6,))), [], [6]),
    (as_line(2, Account(7, pending=(6,), dropped={"same_reward": (2,)})), [], [2]),
])
def test_what_is_lost_or_ends_twice_is_found(line, lost, twice):
    sums = audited([START, *STEPS, line])
    assert (sums.lost, sums.twice, sums.is_clean) == (lost, twice, False)


def test_a_step_that_is_missing_is_found():
    sums = audited([START, STEPS[0], as_line(2, Account(5, pending=(3, 4)))])
    assert sums.faults == ["step 1 is followed by step 2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    write(tmp_path / "metrics.jsonl", [{"step": 0}, {"step": 1}])
    write(tmp_path / "ledger.jsonl", [START, *STEPS, {"step": -1, "ended": "done"}])
    return tmp_path


def write(file: Path, lines: list) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def checkpoint(folder: Path, **state) -> None:
    path = folder / "checkpoints" / "step-000002"
    path.mkdir(parents=True)
    (path / "driver.json").write_text(json.dumps(
        {"step": 2, "next_uid": 7, "unfinished": [6], "prompts_dropped": 2, "version": 2} | state))


def test_the_command_prints_the_accounts(folder, capsys):
    checkpoint(folder)
    assert cli.main(["audit", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2 done, all of them in ledger.jsonl; the run is done" in shown
    assert "2: reward_failed 1, same_reward 1" in shown and shown.endswith("verdict      clean\n")


@pytest.mark.parametrize("state", [{"unfinished": []}, {"next_uid": 9}])
def test_a_checkpoint_that_would_go_on_elsewhere_is_a_fault(folder, state, capsys):
    checkpoint(folder, **state)
    assert cli.main(["audit", str(folder)]) == 1
    assert "step-000002 would start other prompts again than are pending" in capsys.readouterr().out


def test_metrics_that_lack_a_step_are_a_fault(folder):
    write(folder / "metrics.jsonl", [{"step": 1}])
    assert not audit(folder).is_clean


def test_a_killed_run_may_lack_the_last_steps_metrics(folder):
    write(folder / "ledger.jsonl", [START, *STEPS])
    write(folder / "metrics.jsonl", [{"step": 0}])
    sums = audit(folder)
    assert sums.is_clean and sums.ended == "was killed"
    assert dict(told(sums))["pending"] == "1"


def test_no_run_and_one_of_before_there_were_ledgers(tmp_path, folder):
    with pytest.raises(UserError, match="no run's folder"):
        audit(tmp_path / "nothing")
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(UserError, match=r"an older version made this run.*metrics.jsonl has 2 steps"):
        audit(folder)
