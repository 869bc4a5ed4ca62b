"""Monitors: what they are told, and that none stops or delays a run."""

from __future__ import annotations

import sys
import threading

import pytest

from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.observability.monitors import Monitor, Monitors, Run, check_monitors, driving, register_monitor, registry
from flux_ray.observability.run_folder import RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.run import monitoring
from flux_ray.run.recorder import Recorder

pytestmark = pytest.mark.unit

DEADLINE_S = 60.0


class Heard(Monitor):
    """Keeps what it is told."""

    def __init__(self):
        self.heard = []

    def started(self, run):
        self.heard.append(("started", run.name, run.first_step, run.config["model.path"]))

    def step(self, step, metrics):
        self.heard.append(("step", step, metrics))

    def evaluation(self, step, metrics):
        self.heard.append(("evaluation", step, metrics))

    def event(self, kind, text):
        self.heard.append((kind, text))

    def ended(self, how, why):
        self.heard.append(("ended", how, why))


@pytest.fixture
def kinds(monkeypatch):
    """What the test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", {})
    return registry._registered


def recorder(tmp_path, names, **options):
    config = from_dict({"model.path": "some/model", "observability.monitors": names, **options})
    return Recorder(config, folder=RunFolder(tmp_path), terminal=Terminal(sys.stdout, enabled=True))


def test_a_monitor_of_ones_own_hears_all_of_a_run(tmp_path, kinds, capsys):
    made = []

    @register_monitor("mine")
    class Mine(Heard):
        def __init__(self):
            super().__init__()
            made.append(self)

    one = recorder(tmp_path, ["mine"])
    one.step(0, {"reward/mean": 0.5})
    one.warn("look out")
    one.evaluation(1, {"eval/mean": 1.0}, [])
    one.ended("failed", "it broke")
    (mine,) = made
    assert mine.heard == [
        ("started", tmp_path.name, 0, "some/model"), ("step", 0, {"reward/mean": 0.5}), ("warning", "look out"),
        ("evaluation", 1, {"eval/mean": 1.0}), ("ended", "failed", "it broke")]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]


def test_one_that_fails_is_told_once_and_the_others_go_on(tmp_path, kinds, capsys):
    class Fails(Monitor):
        def step(self, step, metrics):
            raise OSError(f"no disk\nat step {step}")

    heard = Heard()
    warnings = []
    monitors = Monitors({"fails": Fails(), "heard": heard}, warn=warnings.append)
    for step in range(3):
        monitors.step(step, {})
    monitors.ended("done", "")
    assert warnings == ["monitor fails failed at step 0: OSError: no disk at step 0; the run goes on, and this is told "
                        "once"]
    assert [entry[0] for entry in heard.heard] == ["step", "step", "step", "ended"]


def test_one_that_cannot_start_gets_nothing_more(tmp_path):
    class Never(Heard):
        def started(self, run):
            raise RuntimeError("no key")

    never, warnings = Never(), []
    monitors = Monitors({"never": never}, warn=warnings.append)
    monitors.started(Run(tmp_path, {}, 0, 1))
    monitors.step(0, {})
    monitors.ended("done", "")
    assert never.heard == []
    assert warnings == ["monitor never failed at start: RuntimeError: no key; it gets nothing more"]


def test_a_slow_one_delays_nothing_and_keeps_a_bounded_number(monkeypatch):
    monkeypatch.setattr(driving, "MOST_WAITING", 3)
    free, begun, warnings = threading.Event(), threading.Event(), []

    class Slow(Heard):
        def step(self, step, metrics):
            begun.set()
            assert free.wait(DEADLINE_S)
            super().step(step, metrics)

    slow = Slow()
    monitors = Monitors({"slow": slow}, warn=warnings.append)
    monitors.step(0, {})
    assert begun.wait(DEADLINE_S)
    for step in range(1, 6):
        monitors.step(step, {})   # returns, though the first is not done
    assert warnings == ["monitor slow is slower than the run: step 4 and others are left out"]
    free.set()
    monitors._driven[0]._thread.join(0.0)
    while monitors._driven[0]._jobs.qsize():
        threading.Event().wait(0.01)
    monitors.ended("done", "")
    assert [entry[1] for entry in slow.heard if entry[0] == "step"] == [0, 1, 2, 3]


def test_one_that_hangs_at_the_end_is_left():
    free, warnings = threading.Event(), []

    class Hangs(Monitor):
        def ended(self, how, why):
            free.wait(DEADLINE_S)

    monitors = Monitors({"hangs": Hangs()}, warn=warnings.append)
    monitors.ended("done", "", within_s=0.1)
    free.set()
    assert warnings == ["monitor hangs had not written all that it was told 0 s after the run's end"]


def test_names_that_are_wrong(kinds, monkeypatch):
    def check(*names):
        check_monitors(names, more=monitoring.HOOKS)

    check("prometheus")
    with pytest.raises(UserError, match=r"unknown monitor 'prometeus'.*did you mean 'prometheus'"):
        check("prometeus")
    with pytest.raises(UserError, match="names prometheus twice"):
        check("prometheus", "prometheus")
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"observability.monitors=\[wandb\] needs .*: pip install 'flux-ray\[wandb\]'"):
        check("wandb")


def test_names_that_cannot_be_registered(kinds):
    with pytest.raises(UserError, match=r"does not inherit from flux_ray\.Monitor"):
        register_monitor("mine")(dict)
    with pytest.raises(UserError, match="'wandb' is registered already"):
        register_monitor("wandb")(Heard)
    register_monitor("mine")(Heard)
    register_monitor("mine")(Heard)   # the same class once more
    with pytest.raises(UserError, match="'mine' is registered already"):
        register_monitor("mine")(Monitor)


def test_the_option_that_was_before_leads_to_it():
    with pytest.raises(UserError, match=r"new name: 'observability.monitors'"):
        from_dict({"observability.tensorboard": True})
