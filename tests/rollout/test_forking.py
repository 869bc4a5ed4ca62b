"""How vLLM's engine core starts on CPU. That a whole engine does is tests/rollout/test_engine.py's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flux_ray.rollout.cpu_startup import forking

pytestmark = pytest.mark.unit


def write_environment(file: str) -> None:
    Path(file).write_text(json.dumps(dict(os.environ)))


def test_the_environment_is_that_of_the_moment_and_not_of_the_process_that_forks(tmp_path, monkeypatch):
    context = forking._Forking()
    monkeypatch.setenv("SAID_BEFORE", "1")
    first = context.Process(target=write_environment, name="first", kwargs={"file": str(tmp_path / "first")})
    first.start()
    first.join(30)
    monkeypatch.setenv("SAID_LATER", "2")
    monkeypatch.delenv("SAID_BEFORE")
    second = context.Process(target=write_environment, name="second", kwargs={"file": str(tmp_path / "second")})
    second.start()
    second.join(30)
    assert first.exitcode == second.exitcode == 0
    assert json.loads((tmp_path / "first").read_text())["SAID_BEFORE"] == "1"
    environment = json.loads((tmp_path / "second").read_text())
    assert environment["SAID_LATER"] == "2" and "SAID_BEFORE" not in environment


def take_name(file: str) -> None:
    import setproctitle

    setproctitle.setproctitle("VLLM::EngineCore")
    Path(file).write_text(Path("/proc/self/cmdline").read_text())


def test_it_can_be_named_whatever_has_become_of_the_environment(tmp_path, monkeypatch):
    """vLLM names its processes, and a user looks for them by that."""
    context = forking._Forking()
    write = context.Process(target=write_environment, name="first", kwargs={"file": str(tmp_path / "first")})
    write.start()  # the process that forks is there from now on, with the environment of now
    write.join(30)
    for name in [*os.environ]:
        monkeypatch.setenv(name, os.environ[name] + " ")
    monkeypatch.setenv("ONE_MORE", "x" * 500)
    named = context.Process(target=take_name, name="named", kwargs={"file": str(tmp_path / "named")})
    named.start()
    named.join(30)
    assert "VLLM::EngineCore" in (tmp_path / "named").read_text()


def test_what_the_linker_would_have_to_load_first_is_told_from_what_is_loaded_anyway(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    nothing = forking._preloads()
    monkeypatch.setenv("LD_PRELOAD", "/x/torch/lib/libgomp.so.1")
    assert forking._preloads() == nothing == set()
    monkeypatch.setenv("LD_PRELOAD", "/x/libtcmalloc.so:/x/torch/lib/libgomp.so.1")
    assert forking._preloads() == {"/x/libtcmalloc.so"}


def test_where_nothing_can_be_forked_vllm_starts_its_core_by_itself(monkeypatch, caplog):
    def fails():
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(forking.forkserver, "ensure_running", fails)
    monkeypatch.setattr(forking, "import_module", lambda name: pytest.fail("nothing to import"))
    forking.fork_engine_core()
    assert "AF_UNIX path too long" in caplog.text
