"""Which checkpoints count, and which go."""

from __future__ import annotations

import pytest
from flux_ray.driver.state import LoopState, checkpoint_folder, find, forget_newer, prune, save, whole

pytestmark = pytest.mark.unit


@pytest.fixture
def checkpoints(tmp_path):
    """Those of a run: steps 2, 4 and 6 are whole, the save of step 8 was interrupted."""
    for step in (2, 4, 6, 8):
        folder = checkpoint_folder(tmp_path / "checkpoints", step)
        (folder / "trainer").mkdir(parents=True)
        if step < 8:
            save(folder, LoopState(step=step, next_uid=0))
    return tmp_path / "checkpoints"


def test_resuming_from_an_older_checkpoint_forgets_the_newer(checkpoints):
    assert find(str(checkpoints.parent)).name == "step-000006"
    forget_newer(checkpoints, 2)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert find(str(checkpoints.parent)).name == "step-000002"
    new = checkpoint_folder(checkpoints, 3)
    new.mkdir()
    save(new, LoopState(step=3, next_uid=0))
    prune(checkpoints, 1)
    assert whole(checkpoints) == [new], "the checkpoint just made is the newest"


def test_nothing_newer_nothing_forgotten(checkpoints):
    (checkpoints / "step-notes").mkdir()
    forget_newer(checkpoints, 8)
    assert len(list(checkpoints.iterdir())) == 5
