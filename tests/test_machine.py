"""Machines as people have them: what is made good before a run, and what is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_ray import UserError, machine

pytestmark = pytest.mark.unit

PRINT_LIMITS = ("import resource; from flux_ray import machine; machine.adapt(); "
                "print(resource.getrlimit(resource.RLIMIT_NOFILE))")
PLACES = machine.SHORT_FOLDERS


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """`adapt` sets these two: they are put back."""
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())


@pytest.fixture
def deep(tmp_path) -> Iterator[Path]:
    folder = tmp_path / ("a_folder_of_a_job" * 5)
    folder.mkdir()
    yield folder
    for link in (Path(place, name) for place in PLACES for name in os.listdir(place)):
        if link.is_symlink() and os.readlink(link) == str(folder):
            link.unlink()


def test_a_long_tmpdir_gets_a_short_name(monkeypatch, deep):
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    for _ in range(2):   # a second run finds the link of the first
        machine.adapt()
        short = os.environ["TMPDIR"]
        assert len(short) <= machine.LONGEST_TMPDIR and Path(short).samefile(deep) and tempfile.gettempdir() == short
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with tempfile.NamedTemporaryFile(dir=short) as file:
        assert (deep / Path(file.name).name).exists()


def test_a_long_tmpdir_without_a_place_for_a_link_is_refused(monkeypatch, deep):
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(machine, "SHORT_FOLDERS", ("/no/such/folder",))
    with pytest.raises(UserError, match=r"a_folder_of_a_job is too long for the sockets .* at most 37 bytes"):
        machine.adapt()


def test_a_link_that_leads_elsewhere_is_not_taken(monkeypatch, deep, tmp_path):
    places = [tmp_path / "p", tmp_path / "q"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(machine, "SHORT_FOLDERS", tuple(map(str, places)))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    machine.adapt()
    (link,) = places[0].iterdir()
    link.unlink()
    link.symlink_to(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    machine.adapt()
    assert tempfile.gettempdir() == str(places[1] / link.name)


def test_a_short_tmpdir_stays(monkeypatch):
    before = tempfile.gettempdir()
    machine.adapt()
    assert tempfile.gettempdir() == before or len(before) > machine.LONGEST_TMPDIR


@pytest.mark.parametrize(("limits", "printed", "said"), [
    ("ulimit -Sn 256; ulimit -Hn 4096", "(4096, 4096)", ""),
    ("ulimit -Sn 256; ulimit -Hn 256", "", "a process may open 256 files here, a run needs 1024: raise the limit"),
])
def test_open_files_are_raised_to_what_is_allowed(limits, printed, said):
    command = f"{limits}; exec {sys.executable} -c '{PRINT_LIMITS}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.stdout.strip() == printed and said in done.stderr


def test_an_environment_with_a_blank_in_its_path_is_refused(monkeypatch):
    machine.refuse_own_ray()
    monkeypatch.setattr(sys, "prefix", "/home/me/my project/env")
    monkeypatch.setattr(sys, "executable", "/home/me/my project/env/bin/python")
    with pytest.raises(UserError, match=r"'/home/me/my project/env' has a blank in its path, .*: make it in another"):
        machine.refuse_own_ray()


def test_a_small_dev_shm_is_told_with_what_to_do(monkeypatch):
    room = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: room)
    assert "/dev/shm has 0.06 GiB free" in str(machine.shared_memory_warning())
    assert "docker run --shm-size=2g" in str(machine.shared_memory_warning())
    room.free = 2**31
    assert machine.shared_memory_warning() is None


@pytest.mark.parametrize("shown", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_hidden_from_deepspeed_too(monkeypatch, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setenv("DS_ACCELERATOR", "")   # put back afterwards
    monkeypatch.delenv("DS_ACCELERATOR")
    machine.adapt()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
