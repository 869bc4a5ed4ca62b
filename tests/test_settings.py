"""Options from a YAML file and from the environment: Python or the command line, environment, file, default."""

from __future__ import annotations

import pytest

from flux_ray import FluxConfig, UserError
from flux_ray.__main__ import compose

pytestmark = pytest.mark.unit

FILE = """
algorithm: dapo
num_generations: 6
train: {learning_rate: 2.0e-6, num_ranks: 2}
reward: {functions: [numeric, "my rewards.py:f"]}
rollout.engine_args: {enforce_eager: true}
data:
  system_prompt: "Be brief, it's {late}."
"""


@pytest.fixture
def file(tmp_path):
    written = tmp_path / "mine.yaml"
    written.write_text(FILE, encoding="utf-8")
    return written


def composed(*words):
    configs = []
    compose(list(words), then=configs.append)
    return configs[0]


@pytest.mark.parametrize("way", ["python", "command line"])
def test_the_order_of_who_says_it(file, monkeypatch, way):
    monkeypatch.setenv("FLUX_TRAIN_LEARNING_RATE", "3e-6")
    monkeypatch.setenv("FLUX_ROLLOUT_GROUP_SIZE", "9")
    monkeypatch.setenv("FLUX_ROLLOUT_STOP", "[a, b]")
    if way == "python":
        config = FluxConfig.from_yaml(file, group_size=10)
    else:
        config = composed("--config", str(file), "num_generations=10")
    assert (config.rollout.group_size, config.train.learning_rate, config.train.num_ranks) == (10, 3e-6, 2)
    assert config.algo.name == "dapo" and config.algo.clip_range_high == 0.28, "with its preset"
    assert config.data.system_prompt == "Be brief, it's {late}."
    assert config.reward.functions == ["numeric", "my rewards.py:f"] and config.rollout.stop == ["a", "b"]
    assert config.rollout.engine_args == {"enforce_eager": True} and config.batch.prompts_per_step == 32


def test_written_and_read_again(file, tmp_path):
    config = FluxConfig.from_yaml(file)
    FluxConfig.to_yaml(config, tmp_path / "again.yaml")
    assert FluxConfig.from_yaml(tmp_path / "again.yaml") == config


def test_the_environment_alone(monkeypatch):
    monkeypatch.setenv("FLUX_MODEL_PATH", "/a/b=c")
    assert FluxConfig().model.path == composed().model.path == "/a/b=c"
    monkeypatch.setenv("FLUX_TRAIN_LEARNING_RAT", "1")
    with pytest.raises(UserError, match="unknown variable 'FLUX_TRAIN_LEARNING_RAT': did you mean 'FLUX_TRAIN_LEARN"):
        FluxConfig()


@pytest.mark.parametrize(("text", "said"), [
    ("- a", "a mapping of options is wanted, not list"),
    ("a: [", "mine.yaml: while parsing"),
    ("grop_size: 3", "mine.yaml: unknown option 'grop_size': did you mean 'rollout.group_size'?"),
    ("defaults: [x]", "put it into DIR/experiment/"),
    ("num_epochs: 3", "the length is in steps"),
])
def test_files_that_are_refused(file, text, said):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        FluxConfig.from_yaml(file)
    assert said in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        composed("--config", f"{file}.gone")
