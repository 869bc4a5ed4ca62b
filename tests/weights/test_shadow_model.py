"""An update that is made ready beside the running model, on vLLM's own models (tests/weights/shadow_models.py).

That it comes over the wire while requests run is tests/rollout/test_engine.py's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Model ► what `shadows` says: with biases, tied, of experts."""
    folder = tmp_path_factory.mktemp("shadows")
    command = [sys.executable, "-m", "tests.weights.shadow_models", str(folder), "qwen2", "gpt2", "mixtral"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_twin_gives_what_a_reload_gives_and_touches_nothing_before(compared, name):
    assert compared[name]["can"] and len(compared[name]["rounds"]) == 2  # the second after a reload of vLLM's own
    for said in compared[name]["rounds"]:
        assert said["beside"] == said["before"] != said["shadow"]
        assert said["shadow"] == said["reload"]
    assert compared[name]["left"] == 0  # else the weights of each update would stay


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_what_is_loaded_is_compared_with_what_was_sent(compared, name):
    said = compared[name]
    assert said["right"] == [[], [], []]
    if name != "mixtral":
        assert all(told for path, told in said["stale"].items() if not path.endswith("anew"))
    if name == "qwen2":  # what GPT-2's file holds transposed is not read back
        assert all(told for told in said["stale"].values())
        assert any("qkv" in path for path in said["stale"]) and any("k_proj.weight has" in c for c in said["checks"])


def test_experts_are_loaded_where_the_engine_stands(compared):
    assert not compared["mixtral"]["can"]
