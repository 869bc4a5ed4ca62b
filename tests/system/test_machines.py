"""Runs on machines as people have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.program import metrics

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

NOBODY = 54321   # a number that no user has
AS_NOBODY = ["--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"]
FEW_FILES = ("import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096)); "
             "from flux_ray.__main__ import main; sys.exit(main(['train', *sys.argv[1:]]))")


def small(toys, run_dir: Path) -> list[str]:
    """The run that starts fastest: no engine, one rank, two steps."""
    return ["algo=sft", f"model.path={toys.untied}", f"data.train={toys.data}", "batch.prompts_per_step=8",
            "train.num_ranks=1", "driver.num_steps=2", f"run_dir={run_dir}"]


def assert_trained(program, run_dir: Path) -> None:
    assert program.end() == 0, program.shown
    assert [line["step"] for line in metrics(run_dir)] == [0, 1] and (run_dir / "model").is_dir()


def has_user_namespaces() -> bool:
    found = shutil.which("unshare")
    return bool(found) and subprocess.run([found, *AS_NOBODY, "true"], capture_output=True, check=False).returncode == 0


def test_a_long_tmpdir_few_files_no_gpu_no_home_and_ray_s_own_word_for_a_ray_of_the_run_s(
        toys, tmp_path, start, monkeypatch):
    """And, where a process may take another number, as a user without a name."""
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    deep = tmp_path / ("a_folder_of_a_job" * 5)
    deep.mkdir()
    user, command = os.getuid(), [sys.executable, "-c", FEW_FILES]
    if has_user_namespaces():
        user, command = NOBODY, ["unshare", *AS_NOBODY, *command]
    program = start(*small(toys, tmp_path / "run"), folder=tmp_path, TMPDIR=str(deep), RAY_ADDRESS="local",
                    CUDA_VISIBLE_DEVICES="",
                    program=("-c", f"import os, sys; os.execvp({command[0]!r}, [*{command!r}, *sys.argv[1:]])"))
    try:
        assert_trained(program, tmp_path / "run")
        assert (deep / "ray").is_dir(), "its files lie where TMPDIR says"
    finally:
        for link in Path("/tmp").glob(f"flux_ray-{user}-*"):
            if os.readlink(link) == str(deep):
                link.unlink()


@pytest.mark.all
def test_two_runs_at_once_have_a_ray_each_whatever_their_folders_are_called(toys, tmp_path, start):
    names = ("my run, lr=1e-5", "[é] #2")
    programs = [start(*small(toys, tmp_path / name), folder=tmp_path / f"of {name}") for name in names]
    for program, name in zip(programs, names, strict=True):
        assert_trained(program, tmp_path / name)


def test_an_environment_with_a_blank_in_its_path_is_refused_at_once(toys, tmp_path, start):
    """Ray would wait for its own processes until it gave up."""
    environment = tmp_path / "an environment"
    environment.symlink_to(sys.prefix)
    code = f"import sys; sys.executable = {str(environment / 'bin/python')!r}; " \
           "from flux_ray.__main__ import main; sys.exit(main(['train', *sys.argv[1:]]))"
    program = start(*small(toys, tmp_path / "run"), folder=tmp_path, program=("-c", code))
    assert program.end() == 2 and "has a blank in its path" in program.shown.splitlines()[-1]
    assert not (tmp_path / "run").exists()
