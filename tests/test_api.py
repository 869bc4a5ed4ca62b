"""The Python API up to the driver's door: names, and rows and functions that other processes can reach."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from flux_ray import FluxConfig, FluxTrainer, TrainingResult, register_adv_estimator, register_policy_loss
from flux_ray.api import name_of
from flux_ray.config import Config, changed
from flux_ray.errors import UserError
from flux_ray.outside_loop import outside_loop
from flux_ray.plugins import load_function

pytestmark = pytest.mark.unit

YAML_BLOCK = """
algorithm:
  name: grpo
  clip_range: 0.3
  entropy_coef: 0.02
  normalize_advantages: false
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_config_from_flat_names():
    config = FluxConfig(
        model_path="Qwen/Qwen3-8B",
        algorithm="grpo",
        algorithm_config={
            "clip_range": 0.2,
            "group_size": 4,
        }
    )
    assert isinstance(config, Config)
    assert (config.model.path, config.algo.name, config.algo.clip_range) == ("Qwen/Qwen3-8B", "grpo", 0.2)
    assert config.rollout.group_size == 4


def test_config_from_a_yaml_block():
    import yaml

    config = FluxConfig(**yaml.safe_load(YAML_BLOCK))
    assert (config.algo.clip_range, config.algo.entropy_coef, config.algo.normalize_by_std) == (0.3, 0.02, False)


def test_an_algorithm_brings_its_preset_and_the_user_wins():
    assert FluxConfig(algorithm="dapo").algo.clip_range_high == 0.28
    assert FluxConfig(algorithm="dapo", algorithm_config={"epsilon_high": 0.5}).algo.clip_range_high == 0.5
    assert FluxConfig(algorithm="sft").train.learning_rate == 2e-5


def test_a_run_that_goes_on_keeps_its_options_but_those_named(tmp_path):
    from flux_ray.observability.run_folder import RunFolder

    before = FluxConfig(model_path="m", algorithm="dapo", epsilon_high=0.4, group_size=8, run_dir="elsewhere")
    RunFolder(tmp_path / "run").create(before, resume_step=None)
    config = FluxConfig(resume="run", num_steps=9)
    assert (config.model.path, config.algo.name, config.algo.clip_range_high) == ("m", "dapo", 0.4)
    assert (config.rollout.group_size, config.driver.num_steps) == (8, 9)
    assert config.run_dir == str(tmp_path / "run")
    assert FluxConfig(resume="run", algorithm="dapo").algo.clip_range_high == 0.4
    assert FluxConfig(resume="run", algorithm="grpo").algo.clip_range_high is None   # another one, with its preset
    with pytest.raises(UserError, match="resume=nowhere"):
        FluxConfig(resume="nowhere")


@pytest.mark.parametrize("options, message", [
    ({"grop_size": 2}, "did you mean 'rollout.group_size'"),
    ({"epsilon": 0.1, "algorithm_config": {"clip_range": 0.2}}, "give one of them"),
    ({"model": "m"}, "takes a mapping"),
])
def test_config_refuses(options, message):
    with pytest.raises(UserError, match=message):
        FluxConfig(**options)


def trainer(**options) -> FluxTrainer:
    return FluxTrainer(FluxConfig(model_path="m", **options))


def test_a_file_of_prompts(tmp_path):
    config = trainer(seed=4).prepare("data.jsonl", **{"driver.num_steps": 3, "eval.every": None})
    assert (config.data.train, config.driver.num_steps, config.eval.every, config.seed) == ("data.jsonl", 3, 0, 4)
    assert list(tmp_path.iterdir()) == []   # the driver makes the folder, once it knows that the run can start


def test_rows_in_memory_become_a_file_of_the_run(tmp_path):
    config = trainer(prompt_column="question").prepare(
        ["1+1=", "2+2="], eval_prompts=[{"question": "3+3=", "answer": "6"}], **{"eval.every": 5})
    assert config.run_dir and config.run_dir.startswith(str(tmp_path / "runs"))
    assert config.data.train == f"{config.run_dir}/data.jsonl" and config.eval.data and config.eval.every == 5
    with open(config.data.train) as train, open(config.eval.data) as held_out:
        assert [json.loads(line) for line in train] == [{"question": "1+1="}, {"question": "2+2="}]
        assert [json.loads(line) for line in held_out] == [{"question": "3+3=", "answer": "6"}]


def test_tables_and_splits_in_memory():
    from datasets import Dataset, DatasetDict

    both = DatasetDict(train=Dataset.from_list([{"prompt": "a"}]), test=Dataset.from_list([{"prompt": "b"}]))
    config = trainer().prepare(both, eval_prompts=both)
    with open(config.data.train) as train, open(config.eval.data) as held_out:
        assert (train.read(), held_out.read()) == ('{"prompt": "a"}\n', '{"prompt": "b"}\n')
    with pytest.raises(UserError, match="a dict holds columns, each a list, but 'prompt' is str"):
        trainer().prepare({"prompt": "a", "answer": 2})


def test_names_of_data_stay_names():
    config = trainer().prepare({"a": "a.jsonl", "b": {"path": Path("b.jsonl"), "weight": 2}},
                               eval_prompts=[Path("c.jsonl")])
    assert config.data.train == {"a": "a.jsonl", "b": {"path": "b.jsonl", "weight": 2}}
    assert config.eval.data == ["c.jsonl"] and config.run_dir is None


def test_runs_of_one_second_have_folders_of_their_own():
    assert len({trainer().prepare(["1+1="]).run_dir for _ in range(3)}) == 3


def test_a_named_folder_is_made(tmp_path):
    assert trainer(run_dir="here/it/is").prepare(["1+1="]).run_dir == str(tmp_path / "here" / "it" / "is")
    assert (tmp_path / "here" / "it" / "is").is_dir()
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="run_dir=taken: can't be made"):
        trainer(run_dir="taken").prepare(["1+1="])


@pytest.mark.parametrize("rows, message", [
    ([3], "row 0: must be a text or a dict"),
    ([{"a": 1}, {"a": object()}], "row 1: "),
])
def test_rows_that_cannot_be_written(rows, message):
    with pytest.raises(UserError, match=message):
        trainer().prepare(rows)


def test_fit_refuses_before_it_starts(tmp_path):
    with pytest.raises(UserError, match=r"data\.train is missing"):
        trainer().fit()
    with pytest.raises(UserError, match=r"driver\.num_steps must be >= 1"):
        trainer().fit("d.jsonl", num_steps=0)
    with pytest.raises(UserError, match="FluxConfig"):
        FluxTrainer({"model_path": "m"})   # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_needs_nothing_that_training_alone_needs(monkeypatch):
    """eval.stop_at and a critic's warm-up may fit what `fit` was given, and not the config alone."""
    from flux_ray import run as runs

    seen: list[Config] = []
    monkeypatch.setattr(runs, "evaluate", lambda config, callbacks: seen.append(config) or {})
    trained = trainer(algorithm="ppo", **{"eval.stop_at": 0.8, "critic.warmup_steps": 300})
    trained.evaluate("test.jsonl")
    assert (seen[0].eval.stop_at, seen[0].critic.warmup_steps, seen[0].eval.data) == (None, 0, "test.jsonl")
    assert trained.config.eval.stop_at == 0.8


def runs_a_loop(config: Config) -> str:
    """As the driver does: a loop of its own, which no thread may start inside another."""
    async def run() -> str:
        return str(config.model.path)
    return asyncio.run(run())


def test_outside_a_loop_nothing_changes_thread():
    assert outside_loop(lambda config: threading.current_thread(), Config()) is threading.current_thread()


async def test_inside_a_running_loop():
    assert outside_loop(runs_a_loop, FluxConfig(model_path="m")) == "m"


async def test_what_a_run_raises_inside_a_loop_is_raised():
    def fails(config: Config) -> None:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        outside_loop(fails, Config())


def module_of(path, source: str) -> ModuleType:
    path.write_text(source)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


REWARD = "def good(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"


def test_a_function_of_a_file(tmp_path):
    module = module_of(tmp_path / "my_rewards.py", REWARD)
    assert name_of(module.good) == f"{tmp_path / 'my_rewards.py'}:good"
    both = FluxTrainer(FluxConfig(model_path="m"), rewards=["numeric", module.good])
    assert both.config.reward.functions == ["numeric", f"{tmp_path / 'my_rewards.py'}:good"]
    assert FluxTrainer(FluxConfig(), rewards="numeric").config.reward.functions == ["numeric"]


def test_a_function_of_a_package():
    from flux_ray.reward.rules import exact_match

    assert name_of(exact_match) == "flux_ray.reward.rules:exact_match"


@pytest.mark.parametrize("call", ["fit('d')", "evaluate('d')"])
def test_a_script_that_would_train_again(tmp_path, call):
    """Found where it is imported, be the call in a function of the script's; under `if __name__` it is none."""

    script = REWARD + "from flux_ray import FluxConfig, FluxTrainer\n"
    run = f"    FluxTrainer(FluxConfig(model_path='m'), rewards=[good]).{call}\n"
    (tmp_path / "script_a.py").write_text(f"{script}if __name__ == '__main__':\n{run}")
    assert load_function(f"{tmp_path / 'script_a.py'}:good", option="reward.functions")([], [0]) == [1.0]
    (tmp_path / "script_b.py").write_text(f"{script}def main():\n{run}main()\n")
    with pytest.raises(UserError, match=r"every process of a run imports .*script_b\.py.*__main__"):
        load_function(f"{tmp_path / 'script_b.py'}:good", option="reward.functions")


def test_a_decorated_function_is_of_its_own_file(tmp_path):
    module = module_of(tmp_path / "decorated.py", "import torch\n@torch.no_grad()\n" + REWARD)
    assert name_of(module.good) == f"{tmp_path / 'decorated.py'}:good"


def test_stop_in_a_notebook_ends_the_run(tmp_path):
    """Ctrl-C's exception in the thread that waits: the run in the other one ends first, and what it ends it with."""
    from flux_ray import run as runs

    events: list[str] = []
    waits = threading.get_ident()

    async def live() -> None:
        runs._interruptible()
        try:
            # To the thread that waits, as the kernel does: raise_signal is for the thread that calls it.
            threading.Timer(0.2, signal.pthread_kill, [waits, signal.SIGINT]).start()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            events.append("closed")

    async def cell() -> None:
        try:
            outside_loop(lambda config: asyncio.run(live()), Config())
        except KeyboardInterrupt:
            events.append("interrupted")

    loop = asyncio.new_event_loop()   # asyncio.run would make a cancellation of the signal; a notebook's loop doesn't
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job is started without
    try:
        loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()
    assert events == ["closed", "interrupted"]


def nested():
    def inner(prompts, completions):
        return [0.0]
    return inner


def test_a_reward_without_a_file_is_handed_over():
    first, second = (lambda completions: [0.0]), (lambda completions: [1.0])
    config = FluxTrainer(FluxConfig(model_path="m"), rewards=[first, second, nested(), first]).config
    assert config.reward.functions == ["given:lambda", "given:lambda_1", "given:inner", "given:lambda"]
    assert load_function("given:lambda_1", option="reward.functions") is second
    with pytest.raises(UserError, match="was a function of the Python process that gave it: give it again"):
        load_function("given:nobody", option="reward.functions")


@pytest.mark.parametrize("function", [lambda prompts, completions: [0.0], nested(), print])
def test_functions_that_cannot_reach_other_processes(function):
    with pytest.raises(UserError, match="other processes can't import it"):
        name_of(function)


def test_a_notebook_s_function():
    cell: dict = {}
    exec(compile(REWARD, "<ipython-input-1>", "exec"), cell)
    with pytest.raises(UserError, match="other processes can't import it"):
        name_of(cell["good"])


REGISTERED = """
from flux_ray import register_adv_estimator, register_policy_loss, register_reward, register_rollout

@register_adv_estimator("from_python")
def estimator(token_level_rewards, response_mask, **kw):
    return token_level_rewards, token_level_rewards

@register_policy_loss("from_python_too")
def loss(old_log_prob, log_prob, advantages, response_mask, **kw):
    return -log_prob * advantages, {}

@register_reward("from_python_as_well")
def reward(prompts, completions, **columns):
    return [1.0 for _ in completions]

@register_rollout("from_python_and_this")
async def rollout(prompt, generate):
    return []
"""


@pytest.fixture
def registries():
    """What a test registers is gone after it."""
    from flux_ray.algo.estimators import ESTIMATORS
    from flux_ray.algo.losses import POLICY_LOSSES
    from flux_ray.reward import registry
    from flux_ray.rollout import functions

    tables = (ESTIMATORS, POLICY_LOSSES, registry._registered, functions._ROLLOUTS)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def test_what_a_script_registers_reaches_other_processes_as_a_plugin(tmp_path, registries):
    """Only where the config names it; the file is imported here as well, and that is no second registration."""
    from flux_ray.plugins import load_plugins

    module = module_of(tmp_path / "my_script.py", REGISTERED)
    file = str(tmp_path / "my_script.py")
    assert trainer().prepare("d.jsonl").plugins == []
    for options in ({"algo.estimator": "from_python"}, {"algorithm": "from_python_too"},
                    {"rollout.function": "from_python_and_this"}):
        assert trainer(**options).prepare("d.jsonl").plugins == [file]
    named = trainer(**{"reward.functions": ["from_python_as_well", "numeric"]}, plugins=["other.py"])
    assert named.prepare("d.jsonl").plugins == ["other.py", file]
    assert trainer(**{"algo.estimator": "from_python"}, plugins=[file]).prepare("d.jsonl").plugins == [file]
    load_plugins([file])
    with pytest.raises(UserError, match="'from_python' is taken"):
        register_adv_estimator("from_python")(module.loss)


def test_what_a_notebook_registers_is_refused(registries):
    register_policy_loss("of_a_cell")(lambda old_log_prob, log_prob, advantages, response_mask, **kw: (log_prob, {}))
    with pytest.raises(UserError, match="other processes can't import it"):
        trainer(**{"algo.policy_loss": "of_a_cell"}).prepare("d.jsonl")


def test_a_second_fit_goes_on_from_what_was_trained(monkeypatch, tmp_path):
    """Its model, the first reference, a folder of its own."""
    ran = []

    def run(config, *, callbacks):
        ran.append(config)
        folder = Path(config.run_dir or tmp_path / "runs/first")
        return TrainingResult(folder, 1, {}, ())

    monkeypatch.setattr("flux_ray.run.run", run)
    trainer = FluxTrainer(FluxConfig(model_path="base", run_dir=str(tmp_path / "mine"), beta=0.1))
    trainer.config = changed(trainer.config, {"resume": "earlier"})
    for _ in range(3):
        trainer.fit("d.jsonl")
    trained = [str(tmp_path / name / "model") for name in ("mine", "mine_2")]
    assert [config.model.path for config in ran] == ["base", *trained]
    assert [config.reference.path for config in ran] == [None, "base", "base"]
    assert [config.resume for config in ran] == ["earlier", None, None]
    assert [config.run_dir for config in ran] == [str(tmp_path / name) for name in ("mine", "mine_2", "mine_3")]
