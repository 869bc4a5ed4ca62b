"""A home folder for those who have none."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import pytest

from flux_ray.home import ensure_home

pytestmark = pytest.mark.unit


def test_a_home_that_works_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.parametrize("home", [None, "", "/", "/proc/nowhere", "/dev/null"])
def test_without_one_there_is_one_of_our_own(monkeypatch, tmp_path, home):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    ensure_home()
    made = Path(os.environ["HOME"])
    assert made.parent == tmp_path and made.is_dir() and made.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.setenv("USER", "")   # put back by monkeypatch, whatever is set below
    ensure_home()
    assert getpass.getuser() == f"user-{os.getuid()}"


@pytest.mark.parametrize("put_there", ["a link", "a folder that others may read"])
def test_what_another_user_may_have_put_there_is_not_taken(monkeypatch, tmp_path, put_there):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    name = tmp_path / f"flux_ray-home-{os.getuid()}"
    if put_there == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "elsewhere")
    else:
        name.mkdir()
        name.chmod(0o755)
    ensure_home()
    made = Path(os.environ["HOME"])
    assert made != name and made.parent == tmp_path and made.stat().st_mode & 0o777 == 0o700
