"""Temporary files of a run's actors go with the run, however it ended."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flux_ray.cluster import scratch
from flux_ray.cluster.scratch import PREFIX, Scratch

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def around(tmp_path_factory, monkeypatch) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="s"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_next_start_removes_what_nobody_holds(around):
    (around / f"{PREFIX}lost").mkdir()
    (around / f"{PREFIX}lost" / ".lock").touch()
    (around / "other").mkdir()
    first = Scratch()
    (first.folder / "socket").touch()
    second = Scratch()
    assert {path.name for path in around.iterdir()} == {first.folder.name, second.folder.name, "other"}
    first.remove()
    assert not first.folder.exists() and second.folder.is_dir()
    second.remove()


def test_sockets_fit_in_where_temporary_files_lie_deep(around, monkeypatch):
    deep = around / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    of_run = Scratch()
    assert len(f"{of_run.folder}/{'0' * 36}") <= 107 and of_run.env["TMPDIR"] == str(of_run.folder)
    assert str(deep) in of_run.env["TORCHINDUCTOR_CACHE_DIR"], "where other runs find it"
    of_run.remove()


def test_it_is_removed_when_the_driver_is_killed(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "socket").touch()
    semaphore, another = (Path(f"/dev/shm/sem.{name}-{tmp_path.parent.name}") for name in ("scratch", "scratch2"))
    semaphore.touch()
    another.touch()
    script = Path(scratch.__file__).with_name("reaper.py")
    reaper = subprocess.Popen([sys.executable, "-I", "-S", str(script), str(tmp_path / "scratch")],
                              stdin=subprocess.PIPE)
    assert reaper.stdin is not None
    assert (tmp_path / "scratch").is_dir()
    reaper.stdin.close()
    assert reaper.wait(timeout=60) == 0 and not (tmp_path / "scratch").exists()
    assert not semaphore.exists() and another.exists()
    another.unlink()


def test_semaphores_of_an_actor_bear_the_folder_s_name(around, monkeypatch):
    of_run = Scratch()
    monkeypatch.setenv("TMPDIR", of_run.env["TMPDIR"])
    monkeypatch.setitem(multiprocessing.current_process()._config, "semprefix", "/mp")
    scratch.name_semaphores()
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    found = list(Path("/dev/shm").glob(f"sem.{of_run.folder.name}-*"))
    del semaphore
    gc.collect()
    assert len(found) == 1
    of_run.remove()
