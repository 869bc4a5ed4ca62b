"""A run's checkpoints as they are written: beside the steps, whole or not at all, and never the end of the run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_ray.cluster.group import ActorError
from flux_ray.config import Config, changed, from_dict
from flux_ray.errors import UserError
from flux_ray.records import LoopState
from flux_ray.run.checkpoint import best, find, verify, whole
from flux_ray.run.saving import Saver, save_models
from tests.fakes.actors import LocalGroup

pytestmark = pytest.mark.unit


class Saves:
    """A rank that writes a file when it may, or fails to."""

    def __init__(self, index: int, *, may: asyncio.Event | None = None, fails: str | None = None,
                 value: float = 1.0) -> None:
        self._name, self._may, self._fails, self._value = f"{index}.safetensors", may, fails, value
        self.backgrounds: list[str] = []

    def save_checkpoint(self, folder: str, background: str) -> None:
        if self._fails == "raises":
            raise RuntimeError("a bug")
        self.backgrounds.append(background)
        self._folder = folder

    async def finish_checkpoint(self) -> str | None:
        if self._may is not None:
            await self._may.wait()
        if self._fails:
            return self._fails
        self.save_model(self._folder)
        return None

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({"master.a": torch.full((3,), self._value)}, Path(folder) / self._name)


def config(**options) -> Config:
    return from_dict({"checkpoint.keep": 2, "eval.data": "e", **options})


def state(step: int) -> LoopState:
    return LoopState(step=step, next_uid=3)


async def nothing_kept(state: LoopState, folder: Path) -> LoopState:
    return state


async def saved(folder: Path, trained, work, **options) -> list[str]:
    """`work(saver)` within a run's tasks; what was warned of."""
    warned: list[str] = []
    saver = Saver(config(**options), lambda: folder / "checkpoints", trained, keep=nothing_kept, warn=warned.append)
    async with asyncio.TaskGroup() as tasks:
        saver.begin(tasks)
        await work(saver)
    return warned


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


async def test_a_checkpoint_has_all_that_is_trained_and_older_ones_go(tmp_path):
    trained = [LocalGroup("trainer", Saves, 2), LocalGroup("critic", Saves, 1)]

    async def work(saver):
        for step in (4, 6, 9):
            await saver.save(state(step))

    assert await saved(tmp_path, trained, work, **{"checkpoint.background": "always"}) == []
    assert names(tmp_path) == ["step-000006", "step-000009"]
    folder, lines = find(str(tmp_path))
    assert lines == [] and sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "critic/0.safetensors", "driver.json", "manifest.json", "trainer/0.safetensors", "trainer/1.safetensors"]
    assert trained[0][0].object.backgrounds == ["always"] * 3


async def test_nothing_counts_before_all_is_on_disk_and_the_next_waits_for_it(tmp_path):
    may = asyncio.Event()
    trained = [LocalGroup("trainer", lambda index: Saves(index, may=may if index else None), 2)]

    async def work(saver):
        await saver.save(state(4))   # gives the ranks back
        second = asyncio.ensure_future(saver.save(state(6)))
        await asyncio.sleep(0.05)
        assert not second.done() and names(tmp_path) == [".step-000004.writing"]
        may.set()
        await second
        assert "step-000004" in names(tmp_path)

    assert await saved(tmp_path, trained, work) == []
    assert names(tmp_path) == ["step-000004", "step-000006"], "the run's end waits for the last one"


@pytest.mark.parametrize(("rank", "why"), [
    ({"fails": "No space left on device"}, "No space left on device"),
    ({"value": float("nan")}, "trainer/1.safetensors: master.a isn't finite"),
])
async def test_a_checkpoint_that_can_t_be_kept_leaves_those_before_it_and_the_run_goes_on(tmp_path, rank, why):
    good = [LocalGroup("trainer", Saves, 2)]
    bad = [LocalGroup("trainer", lambda index: Saves(index, **(rank if index else {})), 2)]
    assert await saved(tmp_path, good, lambda saver: saver.save(state(4))) == []
    warned = await saved(tmp_path, bad, lambda saver: saver.save(state(6)), **{"checkpoint.keep": 1})
    assert warned == [f"the checkpoint of step 6 can't be kept: {why}; the run goes on, and those before it stay"]
    assert names(tmp_path) == ["step-000004"] and verify(tmp_path / "checkpoints" / "step-000004").problem is None


async def test_a_folder_that_can_t_be_made_is_warned_of(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    (line,) = await saved(tmp_path, [LocalGroup("trainer", Saves, 1)], lambda saver: saver.save(state(4)))
    assert line.startswith("the checkpoint of step 4 can't be kept: Not a directory")


async def test_a_mistake_of_ours_ends_the_run(tmp_path):
    bad = [LocalGroup("trainer", lambda index: Saves(index, fails="raises"), 2)]
    with pytest.raises(ExceptionGroup) as raised:
        await saved(tmp_path, bad, lambda saver: saver.save(state(6)))
    assert isinstance(raised.value.exceptions[0], ActorError) and whole(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(("metric", "kept"), [("eval/task_mean", "step-000002"), ("-eval/loss", "step-000003")])
async def test_the_best_evaluation_s_checkpoint_is_kept_and_made_where_there_is_none(tmp_path, metric, kept):
    scores = {0: (0.95, 0.1), 1: (0.3, 3.0), 2: (0.9, 2.0), 3: (float("nan"), 1.0), 4: (0.5, 4.0), 5: (0.6, 5.0)}

    async def work(saver):
        for step, (mean, loss) in scores.items():
            if step in (1, 4, 5):
                await saver.save(state(step))
            await saver.evaluated(state(step), {"eval/task_mean": mean, "eval/loss": loss})

    options = {"checkpoint.best": metric}
    assert await saved(tmp_path, [LocalGroup("trainer", Saves, 1)], work, **options) == []
    assert names(tmp_path) == ["best.json", kept, "step-000004", "step-000005"]
    marked = best(tmp_path / "checkpoints")
    assert marked is not None and marked.step == int(kept[-1])

    async def resumed(saver):
        await saver.evaluated(state(6), {"eval/task_mean": 0.8, "eval/loss": 1.5})

    assert await saved(tmp_path, [LocalGroup("trainer", Saves, 1)], resumed, **options) == []
    assert best(tmp_path / "checkpoints") == marked, "the mark outlives the process"


async def test_a_metric_that_evaluations_lack_is_named(tmp_path):
    with pytest.raises(ExceptionGroup) as raised:
        await saved(tmp_path, [], lambda saver: saver.evaluated(state(0), {"eval/task_mean": 0.1}),
                    **{"checkpoint.best": "eval/task_men"})
    assert isinstance(raised.value.exceptions[0], UserError)
    assert "did you mean 'eval/task_mean'" in str(raised.value.exceptions[0])


def test_what_is_no_metric_of_evaluations_is_refused():
    from flux_ray.config import check_values

    assert check_values(config(**{"checkpoint.best": "-eval/loss"}))
    with pytest.raises(UserError, match=r"checkpoint\.best=reward/mean must be a metric of evaluations"):
        check_values(config(**{"checkpoint.best": "reward/mean"}))
    with pytest.raises(UserError, match=r"checkpoint\.best=eval/loss needs evaluations"):
        check_values(changed(config(**{"checkpoint.best": "eval/loss"}), {"eval.data": None}))


async def test_each_model_that_was_trained_is_in_its_folder(tmp_path):
    trained = [LocalGroup("trainer", Saves, 2), LocalGroup("critic", Saves, 1)]
    await save_models(tmp_path / "model", trained, deadline_s=5)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == [
        "critic/0.safetensors", "model/0.safetensors", "model/1.safetensors"]
