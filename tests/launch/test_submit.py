"""launch/submit.sh against a real Ray cluster of one node that asks for a token."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

REPO = Path(__file__).parents[2]
START_DEADLINE_S = 120
STOP_DEADLINE_S = 30
JOB_DEADLINE_S = 240  # beside other tests on two cores


def free_port(first: int) -> int:
    """A port below 10002: Ray gives those from 10002 on to its workers."""
    for port in range(first, 9900):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which a cluster with a token can be reached."""
    folder = tmp_path_factory.mktemp("cluster")
    link = shorter(folder)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    dashboard = free_port(8300)
    agent = free_port(dashboard + 1)  # its usual one is taken where another Ray runs on this machine
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_DASHBOARD": f"http://127.0.0.1:{dashboard}",
        "OMP_NUM_THREADS": "1",
    }
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=6399", "--num-cpus=1",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats",
         f"--dashboard-agent-listen-port={agent}",
         f"--temp-dir={link}"],
        env=environment, stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT,
    )
    try:
        wait_for(environment, head, folder / "head.log")
        yield environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(STOP_DEADLINE_S)
        link.unlink()


def shorter(folder: Path) -> Path:
    """Ray puts sockets under its folder, whose paths may have 107 bytes: a link with a short name."""
    link = Path("/tmp") / f"flux_{secrets.token_hex(3)}"
    link.symlink_to(folder)
    return link


def wait_for(environment: dict[str, str], head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and head.poll() is None:
        trial = ["ray", "job", "submit", "--address", environment["RAY_DASHBOARD"], "--no-wait", "--", "true"]
        asked = subprocess.run(trial,
                               env=environment, capture_output=True, timeout=START_DEADLINE_S)
        if asked.returncode == 0:   # the dashboard answers earlier than the agent that starts jobs
            return
        time.sleep(1)
    told = asked.stdout.decode() + asked.stderr.decode()
    raise AssertionError(f"ray start did not answer within {START_DEADLINE_S} s:\n{told}\n{log.read_text()[-2000:]}")


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(REPO / "launch" / "submit.sh"), *arguments], env=environment, cwd=REPO,
                          capture_output=True, text=True, timeout=JOB_DEADLINE_S)


def test_a_mistake_fails_the_job_in_one_line(cluster):
    done = submit(cluster, "--working-dir", ".", "--", "grop_size=3")
    assert done.returncode != 0
    assert "flux-ray: unknown option 'grop_size': did you mean 'rollout.group_size'?" in done.stdout + done.stderr


@pytest.mark.parametrize("algorithm", ["sft", pytest.param("grpo", marks=pytest.mark.all)])
def test_a_training_run(cluster, tmp_path, algorithm):
    """Two steps, on the one CPU that the cluster declares; the folder is where the config says; what a shell would read
    otherwise arrives as it was written."""
    template = "a  b $HOME `id` \"q\" * {prompt}; exit 3"
    model = tiny_model(tmp_path / "model", tied=True, context=64)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2", "completion": "2"}\n' * 4)
    more = ["rollout.max_tokens=8", "algo.beta=0"] if algorithm == "grpo" else []
    done = submit(cluster, "--working-dir", ".", "--", f"algo={algorithm}", f"model.path={model}", *more,
                  f"data.train={tmp_path}/data.jsonl", "batch.prompts_per_step=4", "cluster.cpus_per_actor=0.25",
                  f"data.prompt_template='{template}'", "driver.num_steps=2", f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout and "succeeded" in done.stdout
    assert f"done: model in {tmp_path}/run/model" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["driver/version"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["data"]["prompt_template"] == template


@pytest.mark.all  # tests/cluster/test_groups.py shows the refusal on a plan alone
def test_a_plan_that_cannot_be_placed(cluster, tmp_path):
    """Refused in good time, naming the role, its bundle and what the cluster has."""
    model = tiny_model(tmp_path / "model", tied=True, context=64)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    joined = {**cluster, "PYTHONPATH": str(REPO)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flux_ray", "train", f"model.path={model}", f"data.train={tmp_path}/data.jsonl",
         "cluster.address=127.0.0.1:6399", "rollout.max_tokens=8", "rollout.num_engines=2",
         "cluster.placement_deadline_s=4", f"run_dir={tmp_path}/run"],
        env=joined, capture_output=True, text=True, timeout=JOB_DEADLINE_S)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    # The first engine's place has room for the rollout worker beside it.
    assert re.match(r"flux-ray: engine: no place for a group of 1 x \(2 CPU\) within 4 s; the run asks for 6 CPU, "
                    r"the cluster has 1 CPU, of which ", line), line
    assert time.monotonic() - started < 4 + START_DEADLINE_S


def test_without_the_token_nothing_runs(cluster):
    stranger = {key: value for key, value in cluster.items() if not key.startswith("RAY_AUTH")}
    done = submit({**stranger, "HOME": "/nonexistent"}, "--working-dir", ".", "--", "--cfg", "job")
    assert done.returncode != 0 and "group_size" not in done.stdout
    assert re.search("401|[Uu]nauthorized|token", done.stdout + done.stderr)
