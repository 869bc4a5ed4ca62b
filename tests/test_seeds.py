"""Printed examples as tests: every code block runs as it stands, but for the package's name and local paths."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import flux_ray
from flux_ray import UserError
from flux_ray.algo import estimators
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit

SEEDS = Path(__file__).parents[2] / "shared" / "seeds"
BARE = r"^(?:from \w+ import .*?^trainer\.fit\(.*?\)$|@register.*?^\.\.\.$)"
YAML = "algorithm:\nname: grpo\nclip_range: 0.2 # x\nentropy_coef: 0.01\nnormalize_advantages: true\n"
#: Blocks of the same kind that always run, wherever the printed ones are.
OWN = {
    "own call": 'trainer = create_rl_trainer(\n model_name="a/b",\n dataset_name="c/d",\n algorithm="drgrpo",\n'
                ' backend="trl" # a remark\n)',
    "own ppo": 'trainer = create_rl_trainer(\n model_name="a/b",\n dataset_name="c/d",\n algorithm="ppo",\n'
               ' backend="unsloth",\n reward_model_name="e/f"\n)',
    "own trainer": 'from flux import FluxConfig, FluxTrainer\nconfig = FluxConfig(\nmodel_path="a/b",\n'
                   'algorithm="grpo",\nalgorithm_config={\n"clip_range": 0.2,\n"group_size": 4,\n}\n)\n'
                   'trainer = FluxTrainer(config)\ntrainer.fit(prompts="data.jsonl")',
}


def blocks() -> dict[str, str]:
    """Name ► text of each block: fenced ones, and those that a page's export left without a fence."""
    found = dict(OWN)
    for file in sorted(SEEDS.glob("*.txt")) if SEEDS.is_dir() else []:
        text = file.read_text(encoding="utf-8")
        fenced = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        bare = re.findall(BARE, text, re.DOTALL | re.MULTILINE)
        found |= {f"{file.stem} {i}": block for i, block in enumerate([*fenced, *bare])}
    return found


BLOCKS = blocks()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture
def local(model, tmp_path, monkeypatch):
    """The block with our package's name and paths that are here."""
    monkeypatch.chdir(tmp_path)

    def run(block: str) -> dict[str, Any]:
        code = re.sub(r"(model_name|model_path)=\"[^\"]*\"", rf'\1="{model}"', block)
        code = re.sub(r"dataset_name=\"[^\"]*\"", 'dataset_name="data.jsonl"', code)
        names = {"create_rl_trainer": flux_ray.create_rl_trainer}
        exec(compile(re.sub(r"^from flux import", "from flux_ray import", code, flags=re.M), "block", "exec"), names)
        return names

    return run


def test_the_printed_pages_are_here():
    if not SEEDS.is_dir():
        pytest.skip(f"{SEEDS} isn't here: only the blocks in this file are run")
    assert len([name for name in BLOCKS if name not in OWN]) >= 9


@pytest.mark.parametrize("name", [n for n, block in BLOCKS.items() if "create_rl_trainer" in block])
def test_one_call(name, local, tmp_path):
    block = BLOCKS[name]
    algorithm, backend = (re.search(rf'{key}="(\w+)"', block)[1] for key in ("algorithm", "backend"))
    if algorithm == "ppo" and backend != "ray":
        with pytest.raises(UserError, match=f"backend={backend} has no ppo: it has no critic; use backend=ray"):
            local(block)
        block, backend = block.replace(f'backend="{backend}"', 'backend="ray"'), "ray"
    trainer = local(block)["trainer"]
    assert trainer.backend == backend and trainer.config.algo.name == {"drgrpo": "dr_grpo"}.get(algorithm, algorithm)
    assert trainer.config.data.train == "data.jsonl"
    start = "\\n\\nHuman: hi\\n\\nAssistant:"
    replies = ("a", "a" if algorithm == "dpo" else "b")   # whole runs are the system tests'
    chosen, rejected = (f"{start} {reply}" for reply in replies)
    (tmp_path / "data.jsonl").write_text(f'{{"chosen": "{chosen}", "rejected": "{rejected}"}}\n')
    with pytest.raises(UserError, match=r"needs the trl package|no reward: .*reward\.functions|no pair is left"
                                        r"|functions, model:.* is no sequence classification model"):
        trainer.train()


@pytest.mark.parametrize("name", [n for n, block in BLOCKS.items() if "FluxTrainer" in block])
def test_config_and_trainer(name, local):
    """All of it but the training itself, which a file that isn't there stops: whole runs are the system tests'."""
    with pytest.raises(UserError, match=r"data\.jsonl: no such file"):
        local(BLOCKS[name])
    before_fit = BLOCKS[name].partition("trainer.fit")[0]
    config = local(before_fit)["trainer"].config
    assert (config.algo.name, config.algo.clip_range, config.rollout.group_size) == ("grpo", 0.2, 4)
    assert config.algo.beta == 0.01 and config.algo.normalize_by_std


@pytest.mark.parametrize("name", [n for n, block in BLOCKS.items() if "@register_adv_estimator" in block])
def test_a_registered_signature(name, local):
    import torch

    defined = {}

    def register(taken: str):
        with pytest.raises(ValueError, match="is taken"):
            flux_ray.register_adv_estimator(taken)(lambda *a, **kw: a)
        return lambda function: defined.setdefault(taken, function)

    block = re.sub(r"^(#|\.\.\.)", r"    \1", BLOCKS[name], flags=re.M)   # the export took the indentation
    exec(compile(block, "block", "exec"), {"register_adv_estimator": register, "torch": torch})
    (printed_name, printed), = defined.items()
    ours = inspect.signature(estimators.ESTIMATORS[printed_name].function).parameters
    for parameter in inspect.signature(printed).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert ours[parameter.name].default == parameter.default
            assert ours[parameter.name].kind is parameter.kind


def test_the_printed_yaml():
    pages = [file.read_text(encoding="utf-8") for file in SEEDS.glob("*.txt")] if SEEDS.is_dir() else []
    for text in [YAML, *(page for page in pages if "normalize_advantages:" in page)]:
        lines = re.search(r"^algorithm:\n((?:\w+: .*\n)+)", text, re.M)[1]
        import yaml

        assert flux_ray.FluxConfig(algorithm=yaml.safe_load(lines)) == flux_ray.FluxConfig()
