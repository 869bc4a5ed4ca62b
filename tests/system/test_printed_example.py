"""The example that documentations print, run as it is printed: all defaults, from a script of its own.

And a run whose driver is killed, for this one goes on long enough.
"""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ray import checkpoints
from tests.system.program import (
    GONE_DEADLINE_S,
    REPO,
    Program,
    actor_of,
    living,
    metrics,
    open_to_others,
    sessions_of,
)
from tests.system.small_run import MAX_GAP
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
SHOWN = 6  # steps that show the same
CHECKPOINT_EVERY = 4
KILLED_DEADLINE_S = 30


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


@pytest.fixture
def printed(tmp_path, start) -> Program:
    """The block, which says nothing of a number of steps, goes on in its own process."""
    model = terse(tmp_path / "model")
    rows = [{"prompt": f"{i}+{i % 7}=", "answer": str(i + i % 7)} for i in range(50)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "example.py").write_text(as_run(PRINTED, model))
    return start(folder=tmp_path, program=("example.py",), FLUX_CHECKPOINT_EVERY=str(CHECKPOINT_EVERY))


def assert_shows_what_it_must(lines: list[dict]) -> None:
    assert [line["step"] for line in lines] == list(range(len(lines)))
    for line in lines:
        assert set(SIX) <= set(line), set(SIX) - set(line)
        assert line["weights/logprob_gap_max"] <= MAX_GAP
    assert lines[0]["actor/grpo_kl"] == pytest.approx(0.0, abs=1e-6) and lines[-1]["actor/grpo_kl"] > 0


def assert_finite(model: Path) -> None:
    assert torch.isfinite(load_file(model / "model.safetensors")["lm_head.weight"]).all()


def test_it_runs_as_printed_and_where_its_driver_is_killed_no_process_stays(tmp_path, printed):
    """SIGKILL: it can tell nobody, neither its actors nor the process that vLLM started in one of them. Temporary files
    and semaphores go too. Until then it listens on this machine alone."""
    run_dir = run_of(tmp_path, printed)
    printed.wait_for_steps(SHOWN, run_dir=run_dir)
    assert printed.named("EngineCore").is_running()
    sessions = sessions_of(printed.processes())
    assert open_to_others(sessions) == []
    temporary = Path(actor_of(run_dir / "logs" / "engine-0.log").environ()["TMPDIR"])
    assert temporary.is_dir() and semaphores(temporary)
    printed.process.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    assert printed.end(deadline_s=KILLED_DEADLINE_S) == -signal.SIGKILL
    while (left := living(sessions)) and time.monotonic() < killed_s + GONE_DEADLINE_S:
        time.sleep(0.1)
    assert left == []
    assert not temporary.exists() and not semaphores(temporary)
    assert_shows_what_it_must(metrics(run_dir))
    assert_finite(checkpoints.export(run_dir / "checkpoints" / f"step-{CHECKPOINT_EVERY:06d}", tmp_path / "exported"))


@pytest.mark.all  # to the end of all its steps
def test_it_runs_as_printed_to_its_end(tmp_path, printed):
    assert printed.end(deadline_s=600) == 0, printed.shown
    run_dir = run_of(tmp_path, printed)
    assert len(metrics(run_dir)) == NUM_STEPS
    assert_shows_what_it_must(metrics(run_dir))
    assert_finite(run_dir / "model")


def run_of(folder: Path, program: Program) -> Path:
    program.wait_for("run folder")
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def semaphores(temporary: Path) -> list[Path]:
    """Those of the processes whose temporary files lie there."""
    return list(Path("/dev/shm").glob(f"sem.{temporary.name}-*"))
