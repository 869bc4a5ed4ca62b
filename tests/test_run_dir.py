"""The folder of a run: whoever writes into it must see it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flux_ray import run_dir
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.rollout.check import check_installed

pytestmark = pytest.mark.unit


def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="doesn't see what the driver wrote there: name a folder"):
        run_dir.check_seen(str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run_dir.check_seen(str(tmp_path))


def test_on_the_path_alone_is_not_installed():
    check_installed()
    with pytest.raises(UserError, match="isn't installed on"):
        check_installed("no_such_entry_point")


def test_a_run_is_not_put_into_a_folder_that_ray_deletes(tmp_path, monkeypatch):
    job = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(UserError, match="run_dir is missing: this job runs in a copy"):
        run_dir.claim(from_dict({"model.path": "m"}))
    named = run_dir.claim(from_dict({"run_dir": str(tmp_path / "runs/mine")}))
    assert named.run_dir == str(tmp_path / "runs/mine")


HOLDER = """
import sys
from flux_ray.run_dir import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_never_write_to_one_folder(tmp_path):
    """Not even where the first was killed can its lock outlive it."""
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        message = f"a run that goes on writes to it .process {other.pid} on "
        with pytest.raises(UserError, match=message), run_dir.held(str(tmp_path)):
            raise AssertionError("held twice")
    finally:
        other.kill()
        other.wait(30)
    with run_dir.held(str(tmp_path)):
        pass


def test_secrets_are_not_written_and_come_back_from_the_environment(monkeypatch):
    plain = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de", "MONKEY": "1"}
    secret = {"X_KEY": "canary", "HF_TOKEN": "canary", "db_password": "canary", "AWS_SECRET_ACCESS_KEY": "canary"}
    config = from_dict({"cluster.env": {**plain, **secret}})
    written = run_dir.hidden(config)
    assert written.cluster.env == {**plain, **dict.fromkeys(secret, "***")}
    for name in secret:
        monkeypatch.setenv(name, "canary")
    assert run_dir.shown(written) == config
    monkeypatch.delenv("X_KEY")
    with pytest.raises(UserError, match=r"cluster\.env\.X_KEY: .* set X_KEY in the environment"):
        run_dir.shown(written)
