"""What is done after steps whose numbers are not finite, and after gradients of 0."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from flux_ray.records import LoopState
from flux_ray.run.numbers import MOST_SKIPPED, WITHOUT_GRADIENT, Numbers, NumbersWentWrong
from flux_ray.run.restarts import Restarts, is_fault

pytestmark = pytest.mark.unit

SKIPPED = {"train/skipped": 1.0}
FINE = {"train/skipped": 0.0, "train/grad_norm": 0.5}
NOTHING = {"train/skipped": 0.0, "train/grad_norm": 0.0}


class Noted:
    """As much of a Recorder as is asked for."""

    def __init__(self, path) -> None:
        self.folder = SimpleNamespace(path=path, checkpoints=path / "checkpoints")
        self.said: list[str] = []
        self.steps_done, self.was_ready = 0, True

    def warn(self, text: str) -> None:
        self.said.append(text)

    def go_back(self, step: int) -> None:
        self.steps_done = step


@dataclass(frozen=True)
class Prepared:
    """As much of a prepared run as is asked for."""

    config: Any
    start: LoopState = field(default_factory=lambda: LoopState(0, 0))
    checkpoint: None = None


@pytest.fixture
def noted(tmp_path) -> Any:
    return Noted(tmp_path)


def test_a_skipped_step_is_told_with_its_cause_and_its_file(noted):
    (noted.folder.path / "bad_batches").mkdir()
    told = {"step": 4, "skipped": [{"update": 3, "why": "the model's log-probs on rank 1"}]}
    (noted.folder.path / "bad_batches" / "step-000004-trainer.json").write_text(json.dumps(told))
    Numbers(noted).after(4, SKIPPED)
    (line,) = noted.said
    assert line.startswith("step 4: not finite: the model's log-probs on rank 1 (update 3). The update is left out")
    assert f"{noted.folder.path}/bad_batches/step-000004-*.safetensors" in line
    assert f"`flux-ray replay {noted.folder.path} --step 3 --left-out` computes it again" in line
    assert "\n" not in line


@pytest.mark.parametrize("one", [
    SKIPPED, {"train/skipped": 0.25, "train/grad_norm": 1.0}, FINE | {"critic/skipped": 1.0},
])
def test_three_in_a_row_are_too_many(noted, one):
    """Of a policy or a critic, of all updates of a step or of some. A step that is made begins the count anew."""
    numbers = Numbers(noted)
    steps = [one] * (MOST_SKIPPED - 1) + [FINE] + [one] * (MOST_SKIPPED - 1)
    for step, metrics in enumerate(steps):
        numbers.after(step + 1, metrics)
    with pytest.raises(NumbersWentWrong, match=r"step 6: .* 3 steps in a row were left out"):
        numbers.after(len(steps) + 1, one)
    assert len(noted.said) == 2 * (MOST_SKIPPED - 1)


@pytest.mark.parametrize(("more", "why"), [
    ({"reward/same_frac": 0.5}, "mostly"), ({"train/num_tokens": 0.0}, "no token"), ({}, "mostly"),
])
def test_a_gradient_of_nothing_is_told_once(noted, more, why):
    numbers = Numbers(noted)
    steps = [NOTHING] * (WITHOUT_GRADIENT - 1) + [FINE] + [NOTHING, {"critic/grad_norm": 1.0}] * (WITHOUT_GRADIENT + 3)
    for step, metrics in enumerate(steps):
        numbers.after(step + 1, metrics | more)
    (line,) = noted.said
    assert "exactly 0 for 5 steps in a row" in line
    assert why in line


def test_the_run_goes_back_once(noted):
    """A second time it ends with what was wrong, though it got further; another fault is still forgiven."""
    config = SimpleNamespace(cluster=SimpleNamespace(max_restarts=3))
    prepared: Any = Prepared(config)
    restarts, wrong = Restarts(prepared, noted), NumbersWentWrong("step 9: 3 steps in a row were left out")
    assert is_fault(wrong)
    noted.steps_done = 9
    restarts.after(ExceptionGroup("tasks", [wrong]))
    assert noted.said == [f"{wrong}: going on from step 0"]
    restarts.after(TimeoutError("something stood still"))
    noted.steps_done = 20
    with pytest.raises(NumbersWentWrong):
        restarts.after(wrong)
