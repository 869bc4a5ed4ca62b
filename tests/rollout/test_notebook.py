"""What a notebook's cell registers reaches the processes that call it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from flux_ray import FluxConfig, FluxTrainer, UserError
from flux_ray.config import PolicyGradientConfig
from flux_ray.records import FINISH_STOP, Completion, Prompt
from flux_ray.reward import RewardWorker, Surroundings, ask_signatures, registry, resolve_functions
from flux_ray.rollout import functions
from flux_ray.rollout.environments import SandboxedRollout
from tests.reward.test_reward_worker import make_group, responses_to
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

CELL = """
from flux_ray import register_reward, register_rollout
from flux_ray.rollout.functions import one_turn

VALUE = 0.5

@register_reward("graded_in_a_cell")
def graded(completions, answer, **columns):
    return [VALUE if text == right else 0.0 for text, right in zip(completions, answer)]

@register_reward("shaped_in_a_cell", shaping=True)
def shaped(completions, **columns):
    return [0.25 for _ in completions]

@register_rollout("rolled_in_a_cell")
async def rolled(prompt, generate):
    return [one_turn(prompt, completion) for completion in await generate(prompt.token_ids, n=prompt.num_samples)]
"""


@pytest.fixture
def cell() -> Iterator[dict]:
    """The globals of a notebook in which the cell was run: its functions are of __main__ and have no file."""
    tables = (registry._registered, functions._ROLLOUTS)
    before = [dict(table) for table in tables]
    names = {"__name__": "__main__"}
    exec(compile(CELL, "<ipython-input-1-0123456789ab>", "exec"), names)
    yield names
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def prepared() -> PolicyGradientConfig:
    trainer = FluxTrainer(FluxConfig(model_path="m", rollout={"function": "rolled_in_a_cell"}, reward={
        "functions": ["graded_in_a_cell", "shaped_in_a_cell"], "options": {"graded_in_a_cell": {}}}))
    config = trainer.prepare("d.jsonl")
    assert isinstance(config, PolicyGradientConfig) and config.plugins == []
    return config


def test_rewards_of_a_cell(cell):
    config = prepared()
    assert config.reward.functions == ["given:graded_in_a_cell", "given:shaped_in_a_cell"]
    group = make_group(["42", "41"], columns={"answer": "42"})
    resolve_functions(config.reward, config.data, set(group.prompt.columns), ask_signatures(config))
    surroundings = Surroundings.here(config.reward)

    async def score():
        worker = RewardWorker(config, surroundings)
        try:
            return await worker.score(responses_to(group))
        finally:
            worker.close()

    scores = asyncio.run(score())
    assert scores.rewards.tolist() == [0.75, 0.25] and scores.task_rewards.tolist() == [0.5, 0.0]
    assert scores.parts["graded_in_a_cell"].tolist() == [0.5, 0.0]   # a metric by the name that it was registered by


class Policy:
    """An engine's answers, as the rollout worker has them for a child."""

    async def __call__(self, token_ids, *, n=1, sample=0, max_tokens=None):
        return [Completion(np.array([5, 2], np.int32), np.zeros(2, np.float32), np.full(2, 3, np.int32), FINISH_STOP)
                for _ in range(n)]

    def restart(self) -> None:
        pass


def test_a_rollout_of_a_cell(cell, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = prepared()
    assert config.rollout.function == "given:rolled_in_a_cell"
    packed = functions.packed_rollout(config.rollout.function)

    async def roll():
        sandbox = SandboxedRollout(config, tokenizer_path=str(tmp_path), packed=packed)
        await sandbox.start()
        try:
            return await sandbox(Prompt(0, 0, "q:", np.array([7, 8], np.int32), {}, 2, 1), Policy())
        finally:
            sandbox.close()

    trajectories = asyncio.run(roll())
    assert [trajectory.token_ids.tolist() for trajectory in trajectories] == [[7, 8, 5, 2]] * 2


def test_a_cell_that_is_run_again_registers_anew(cell):
    """Its functions take the old ones' places; a name that another function has is still refused."""
    before = registry.get_reward("graded_in_a_cell")
    exec(compile(CELL.replace("0.5", "0.125"), "<ipython-input-2-ba9876543210>", "exec"), {"__name__": "__main__"})
    assert registry.get_reward("graded_in_a_cell") is not before
    with pytest.raises(UserError, match="'graded_in_a_cell' is registered already"):
        registry.register_reward("graded_in_a_cell")(cell["shaped"])
