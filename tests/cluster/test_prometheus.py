"""A run's metrics come out of Ray's own exporter, under the names that the dashboard asks for."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from flux_ray.cluster.prometheus import METRIC, STEPS
from tests.house.source import REPO

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

PROGRAM = """
import sys, time, urllib.request
import ray
from flux_ray.cluster.prometheus import METRIC, Prometheus
from flux_ray.observability.monitors import Monitors, Run
from pathlib import Path
monitors = Monitors({"prometheus": Prometheus()}, warn=lambda text: sys.exit(text))
monitors.started(Run(Path("runs/first"), {}, 0, 2))
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
monitors.step(0, {"reward/mean": 0.25})
monitors.step(1, {"reward/mean": 0.5})
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
end_s, text = time.monotonic() + 90, ""
while METRIC not in text and time.monotonic() < end_s:
    time.sleep(1.0)
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError as error:
        print(error, file=sys.stderr)
monitors.ended("done", "")
print(*[line for line in text.splitlines() if "flux_ray" in line], sep="\\n")
ray.shutdown()
"""


def test_ray_exports_the_last_value_of_each_metric():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPO, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert re.search(rf'^ray_{METRIC}\{{.*metric="reward/mean".*run="first".*\}} 0.5$', done.stdout, re.M), done
    assert re.search(rf'^ray_{STEPS}\{{.*run="first".*\}} 2.0$', done.stdout, re.M), done.stdout


def test_the_dashboard_asks_for_what_is_exported():
    board = json.loads((REPO / "launch" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 8
    assert all(f"ray_{METRIC}" in expression or f"ray_{STEPS}" in expression for expression in asked)
