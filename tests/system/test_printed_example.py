"""The example that documentations print, run as it is printed: all defaults, from a script of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.system.program import REPO, metrics
from tests.tiny import EOS_ID, tiny_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(700)]

PRINTED = """\
from flux import FluxConfig, FluxTrainer
config = FluxConfig(
    model_path="Qwen/Qwen3-8B",
    algorithm="grpo",
    algorithm_config={
        "clip_range": 0.2,
        "group_size": 4,
    }
)
trainer = FluxTrainer(config)
trainer.fit(prompts="data.jsonl")
"""
SIX = ("actor/grpo_kl", "actor/clip_frac", "actor/entropy", "actor/adv_mean", "actor/adv_std", "actor/ratio_mean")
NUM_STEPS = 100  # the default
SHOWN = 10  # steps that show the same


def as_run(block: str, model: Path) -> str:
    """The block with the package's name and the model's path in it, and nothing else changed."""
    return block.replace("from flux import", "from flux_ray import").replace('"Qwen/Qwen3-8B"', repr(str(model)))


def flat(block: str) -> str:
    return re.sub(r"\s+", "", block)


def test_the_printed_block_is_the_one_that_runs():
    files = sorted((REPO.parent / "shared" / "seeds").glob("002_*.txt"))
    if not files:
        pytest.skip("../shared/seeds is not here")
    block = re.search(r"^from flux import.*?^trainer\.fit\(.*?\)$", files[0].read_text(), re.DOTALL | re.MULTILINE)
    assert block and flat(block[0]) == flat(PRINTED)


def terse(folder: Path) -> Path:
    """A model whose answers end after a few tokens: every embedding points where the end token's head row looks."""
    tiny_model(folder, tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] += 1.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][EOS_ID, 0] = 5.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("num_steps", [SHOWN, pytest.param(NUM_STEPS, marks=pytest.mark.all)])
def test_it_runs_as_printed(tmp_path, start, num_steps):
    """The block says nothing of a number of steps: the environment may."""
    model = terse(tmp_path / "model")
    rows = [{"prompt": f"{i}+{i % 7}=", "answer": str(i + i % 7)} for i in range(50)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "example.py").write_text(as_run(PRINTED, model))
    fewer = {} if num_steps == NUM_STEPS else {"FLUX_DRIVER_NUM_STEPS": str(num_steps)}
    program = start(folder=tmp_path, program=("example.py",), **fewer)
    assert program.end(deadline_s=600) == 0, program.shown
    (run_dir,) = (tmp_path / "runs").iterdir()
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(num_steps))
    for line in lines:
        assert set(SIX) <= set(line), set(SIX) - set(line)
    assert lines[0]["actor/grpo_kl"] == pytest.approx(0.0, abs=1e-6) and lines[-1]["actor/grpo_kl"] > 0
    assert torch.isfinite(load_file(run_dir / "model" / "model.safetensors")["lm_head.weight"]).all()
