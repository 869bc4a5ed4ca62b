"""The driver's benchmark: real rollout workers between made engines, rewards, reference and ranks."""

import pytest

from benchmarks.parts import run_part
from benchmarks.work import make_model, model_of

pytestmark = [pytest.mark.system, pytest.mark.all, pytest.mark.timeout(300)]

STEPS, GROUPS = 3, 4


def test_a_run_of_made_actors_tells_what_each_group_costs(tmp_path):
    make_model(model_of(tmp_path), "small")
    steps = run_part("driver", tmp_path, deadline_s=200.0, groups=GROUPS, steps=STEPS, tokens=8, hold_s=0.05,
                     num_workers=2, made_rewards=True)
    assert len(steps) == STEPS and all(step["cpu_s"] > 0 and step["calls"] > 0 for step in steps[1:])
    assert all({"rollout", "reward"} <= set(step) for step in steps)
