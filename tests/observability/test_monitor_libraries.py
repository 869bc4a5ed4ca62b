"""What each monitor's own library writes without a network, over two processes of one run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.house.source import REPO

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

#: Two processes of one run, the second of which does step 2 again; what they print is the library's own.
PROGRAM = """
import sys
from flux_ray.config import from_dict
from flux_ray.observability.run_folder import RunFolder
from flux_ray.observability.terminal import Terminal
from flux_ray.run.recorder import Recorder
name, folder, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = from_dict({"model.path": "some/model", "observability.monitors": [name]})
recorder = Recorder(config, folder=RunFolder(folder), terminal=Terminal(sys.stderr, enabled=True), steps_done=first)
for step in range(first, last):
    recorder.step(step, {"reward/mean": step / 4, "train/loss": float("nan")})
recorder.evaluation(last, {"eval/task_mean": 0.5}, [])
recorder.warn("look out")
recorder.ended("done")
"""


def written_by(name, tmp_path):
    """The run's folder after two processes: steps 0 to 2, then 2 to 3."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'flux-ray[{name}]'")
    folder = tmp_path / "run"
    folder.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    environ |= {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(REPO)}
    for first, last in (("0", "3"), ("2", "4")):
        done = subprocess.run([sys.executable, "-c", PROGRAM, name, str(folder), first, last], cwd=tmp_path,
                              env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "warning: monitor" not in done.stderr, done.stderr
    return folder


def test_tensorboard_writes_every_step_once(tmp_path):
    folder = written_by("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("eval/task_mean")] == [(4, 0.5)]   # that of step 3 was cut


def test_wandb_writes_without_a_network(tmp_path):
    folder = written_by("wandb", tmp_path)
    files = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    identity = (folder / ".wandb-id").read_text()
    assert all(identity in file.name for file in files)   # one run for W&B
    assert b"reward/mean" in files[0].read_bytes()


def test_mlflow_writes_into_the_folder(tmp_path):
    folder = written_by("mlflow", tmp_path)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    run = client.get_run((folder / ".mlflow-id").read_text())
    assert run.info.status == "FINISHED" and run.data.params["model.path"] == "some/model"
    assert run.data.tags["last_warning"] == "look out"
    steps = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "reward/mean")}
    assert steps == {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75}


def test_trackio_writes_on_this_machine(tmp_path):
    written_by("trackio", tmp_path)
    code = ("import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S; "
            "(run,) = trackio.Api().runs('flux_ray'); print(json.dumps([run.name, S.get_logs('flux_ray', 'run')]))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                           env={**os.environ, "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")})
    assert shown.returncode == 0, shown.stderr
    name, history = json.loads(shown.stdout.splitlines()[-1])
    assert name == "run"
    assert {line["step"]: line["reward/mean"] for line in history if "reward/mean" in line} == {
        0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75}
