"""Rollouts by themselves: the documentation's calculator, and the registry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Completion, Prompt
from flux_ray.rollout.functions import get_rollout, register_rollout
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit

CALCULATOR = Path(__file__).parents[2] / "docs" / "examples" / "calculator.py"


class Said:
    """A policy that says what is written down, turn by turn; it notes what it was shown."""

    def __init__(self, *turns: tuple[str, str]) -> None:
        self.tokenizer = tiny_tokenizer()
        self.seen: list[str] = []
        self._turns = list(turns)

    async def __call__(self, token_ids, *, n=1, sample=0):
        self.seen.append(self.tokenizer.decode(token_ids))
        text, reason = self._turns.pop(0)
        ids = np.array(self.tokenizer.encode(text), np.int32)
        return [Completion(ids, np.full(len(ids), -0.5, np.float32), np.full(len(ids), 3, np.int32), reason)]


def trajectory_of(policy: Said):
    ids = np.array(policy.tokenizer.encode("q:"), np.int32)
    prompt = Prompt(uid=0, row=0, text="q:", token_ids=ids, columns={}, num_samples=1, seed=0)
    (trajectory,) = asyncio.run(get_rollout(f"{CALCULATOR}:with_calculator")(prompt, policy))
    return trajectory


def test_the_calculator_answers_and_the_policy_goes_on():
    policy = Said(("12+30=", FINISH_STOP), (" so 42", FINISH_STOP))
    trajectory = trajectory_of(policy)
    assert policy.seen == ["q:", "q:12+30=42"], "the second turn sees what the tool said"
    text = policy.tokenizer.decode(trajectory.token_ids)
    assert text == "q:12+30=42 so 42"
    unsampled = policy.tokenizer.decode(trajectory.token_ids[~trajectory.loss_mask])
    assert unsampled == "q:42", "the prompt and the tool's tokens are not trained on"
    assert (trajectory.versions[trajectory.loss_mask] == 3).all()
    assert (trajectory.sampler_logprobs[~trajectory.loss_mask] == 0).all()


@pytest.mark.parametrize(("text", "reason"), [("no sum", FINISH_STOP), ("12+30=", FINISH_LENGTH)])
def test_without_an_expression_or_room_there_is_one_turn(text, reason):
    policy = Said((text, reason))
    trajectory = trajectory_of(policy)
    assert policy.seen == ["q:"] and trajectory.finish_reason == reason


def test_a_name_is_taken_once():
    async def mine(prompt, generate):
        return []

    async def other(prompt, generate):
        return [None]

    assert register_rollout("made for this test")(mine) is mine is get_rollout("made for this test")
    with pytest.raises(ValueError, match="registered already"):
        register_rollout("made for this test")(other)


def test_every_call_of_a_rollout_draws_afresh():
    """A turn that is drawn for the whole group counts as one of each sample: their next has other seeds."""
    from flux_ray.rollout.engine import _Generate

    seeds: list[int] = []

    class Engine:
        tokenizer = None

        def room_for(self, num_tokens, *, prompt_length):
            return 8

        async def generate(self, token_ids, *, n, seed, temperature, max_tokens):
            seeds.extend(range(seed, seed + n))  # as vLLM gives them to the samples of one request
            return []

    prompt = Prompt(0, 0, "a", np.array([5], np.int32), {}, 4, 100)

    async def rollout():
        generate = _Generate(Engine(), prompt, 1.0)
        await generate(prompt.token_ids, n=4)
        for sample in range(4):
            await generate(prompt.token_ids, sample=sample)
        await generate(prompt.token_ids, n=2, sample=1)
        await generate(prompt.token_ids, n=2, sample=2)

    asyncio.run(rollout())
    assert len(seeds) == len(set(seeds)) == 12 and seeds[:4] == [100, 101, 102, 103]
