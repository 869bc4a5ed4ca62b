"""After which failures a run goes on, from where, and how often."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flux_ray.cluster.group import ActorDied, ActorError, ActorLate, CallFailed
from flux_ray.errors import UserError
from flux_ray.observability.run_folder import RunFolder
from flux_ray.records import LoopState
from flux_ray.run.numbers import NumbersWentWrong
from flux_ray.run.prepare import Prepared
from flux_ray.run.restarts import Restarts, is_fault

pytestmark = pytest.mark.unit

DIED = ActorDied("trainer 1 died (SIGKILL)", role="trainer", index=1)


@pytest.mark.parametrize(("error", "goes_on"), [
    (DIED, True),
    (TimeoutError("trainer 0 did not finish train_held within 180 s"), True),
    (ActorError("x", role="trainer", index=0, raised="DistBackendError"), True),
    (ActorError("RuntimeError: Connection closed by peer", role="trainer", index=0, raised="RuntimeError"), True),
    (CallFailed.of(ConnectionResetError("gone")).as_error("engine", 0, what="generate", log_dir=None), True),
    (ActorError("ValueError: a mask of another shape", role="trainer", index=0, raised="ValueError"), False),
    (ActorError("TimeoutError: a user's", role="rollout", index=0, raised="TimeoutError"), False),
    (ActorError("KeyError: a user's reward", role="reward", index=0, raised="KeyError"), False),
    (UserError("model.path is missing"), False),
    (RuntimeError("no group passes the filter"), False),
])
def test_what_dies_or_falls_silent_may_live_the_next_time_and_a_mistake_does_not(error, goes_on):
    assert is_fault(error) is goes_on


@pytest.mark.parametrize(("error", "leaves"), [
    (DIED, True),
    (ExceptionGroup("tasks", [DIED]), True),
    (ActorDied("x", role="critic", index=0), True),
    (ActorLate("trainer 0 did not finish train_held within 180 s", role="trainer", index=0), True),
    (NumbersWentWrong("step 9: 3 steps in a row were left out"), True),
    (ActorDied("x", role="engine", index=0), False),
    (ActorDied("Ray's raylet died", role="ray", index=0), False),
    (TimeoutError("rollout 0 answers nobody"), False),
])
def test_where_ranks_alone_are_lost_all_other_actors_stay(recorded, error, leaves):
    assert restarts(recorded).leaves_others(error) is leaves


def test_they_stay_once_at_a_step(recorded):
    lives = restarts(recorded)
    recorded.steps_done = 4
    assert lives.leaves_others(DIED)
    lives.after(DIED)
    recorded.steps_done = 3
    assert not lives.leaves_others(DIED), "another actor may be to blame"
    recorded.steps_done = 5
    assert lives.leaves_others(DIED)


class Recorded:
    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.steps_done, self.was_ready, self.warnings = folder, 0, True, []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def go_back(self, step: int) -> None:
        self.steps_done = step


@pytest.fixture
def recorded(tmp_path) -> Recorded:
    return Recorded(RunFolder(tmp_path))


def restarts(recorded: Recorded, most: int = 2, **start) -> Restarts:
    config = SimpleNamespace(cluster=SimpleNamespace(max_restarts=most))
    first = Prepared(config, None, LoopState(**{"step": 0, **start}), None, ())  # type: ignore[arg-type]
    return Restarts(first, recorded)  # type: ignore[arg-type]


def commit(recorded: Recorded, step: int) -> None:
    folder = recorded.folder.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "driver.json").write_text(json.dumps(
        {"step": step, "next_uid": 8 * step, "unfinished": [], "prompts_dropped": 0, "version": step}))


def test_it_goes_on_from_the_newest_checkpoint_above_all_versions(recorded):
    commit(recorded, 3)
    recorded.folder.metrics(4, {"driver/version": 9.0})
    recorded.steps_done = 5
    prepared = restarts(recorded).after(DIED)
    assert (prepared.start.step, prepared.start.next_uid, prepared.start.version) == (3, 24, 10)
    assert prepared.checkpoint == recorded.folder.checkpoints / "step-000003"
    assert recorded.steps_done == 3
    assert recorded.warnings[-1] == "trainer 1 died (SIGKILL): going on from step 3"


def test_without_a_checkpoint_it_begins_where_this_process_began(recorded):
    prepared = restarts(recorded, step=7, next_uid=50).after(DIED)
    assert (prepared.start.step, prepared.start.next_uid, prepared.checkpoint) == (7, 50, None)


def test_it_ends_where_it_gets_no_further(recorded):
    lives = restarts(recorded, most=2)
    recorded.steps_done = 4
    lives.after(DIED)
    recorded.steps_done = 4
    lives.after(DIED)
    assert recorded.warnings[-1].endswith("(2 of 2 without getting further)")
    recorded.steps_done = 4
    with pytest.raises(ActorDied):
        lives.after(DIED)


def test_each_step_beyond_the_furthest_one_counts_anew(recorded):
    lives = restarts(recorded, most=1)
    for step in (4, 5, 6, 7):
        recorded.steps_done = step
        lives.after(DIED)


def test_it_ends_at_once_where_it_never_was_ready_or_is_told_to(recorded):
    with pytest.raises(ActorDied):
        restarts(recorded, most=0).after(DIED)
    recorded.was_ready = False
    with pytest.raises(ActorDied):
        restarts(recorded).after(DIED)
