"""Rollouts by themselves: the documentation's calculator, the registry, and what an engine is asked for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flux_ray.cluster.group import Members
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.messages import Assignment
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Completion, Prompt, Sampled, SamplingRequest
from flux_ray.rollout.functions import Turns, get_rollout, register_rollout, single_turn
from flux_ray.rollout.generate import EngineLost, Limits, PromptGenerate
from flux_ray.rollout.sampling import Sampling
from tests.fakes.actors import LocalActor
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit

CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator.py"


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


def turn(ids: list[int], *, shown: int, of: int) -> Completion:
    """A turn after `shown` tokens; `of`: the expert of all of them and its own, but the last."""
    num = shown + len(ids) - 1
    return Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), np.full(len(ids), 3, np.int32),
                      FINISH_STOP, np.full((num, 1, 1), of, np.uint8))


def test_experts_of_a_token_are_those_of_the_turn_that_it_was_new_in():
    turns = Turns([5, 6])
    turns.sampled(turn([7, 8], shown=2, of=1))
    turns.observed([9])
    turns.sampled(turn([4, 2], shown=5, of=2))
    turns.observed([9, 9])
    trajectory = turns.finish()
    assert trajectory.experts.dtype == np.uint8 and trajectory.experts[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert trajectory.num_tokens == 9, "of the last sampled token, and what a tool says at the end, nothing is known"


def test_experts_of_a_turn_that_saw_other_tokens_are_unknown():
    turns = Turns([5, 6])
    turns.sampled(turn([7, 8], shown=2, of=1))
    turns.sampled(turn([4, 2], shown=3, of=2))  # a token was kept from the policy
    assert turns.finish().experts[:, 0, 0].tolist() == [1, 1, 1]
    without = Turns([5])
    without.sampled(Completion(np.array([2], np.int32), np.zeros(1, np.float32), np.array([7], np.int32), FINISH_STOP))
    assert without.finish().experts is None


def test_a_name_is_taken_once():
    async def mine(prompt, generate):
        return []

    async def other(prompt, generate):
        return [None]

    assert register_rollout("made for this test")(mine) is mine is get_rollout("made for this test")
    with pytest.raises(ValueError, match="registered already"):
        register_rollout("made for this test")(other)


class Noted:
    """An engine that notes what it is asked, and answers each with one token of the newest version."""

    def __init__(self, *, answers_after_s: float = 0.0) -> None:
        self.asked: list[SamplingRequest] = []
        self.cancelled = 0
        self._answers_after_s = answers_after_s

    async def context_length(self) -> int:
        return 20

    async def generate(self, request: SamplingRequest) -> Sampled:
        self.asked.append(request)
        try:
            await asyncio.sleep(self._answers_after_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        one = Completion(np.array([5], np.int32), np.zeros(1, np.float32), np.array([7], np.int32), FINISH_STOP)
        return Sampled((one,) * request.n, step=10 - len(self.asked))

    @property
    def seeds(self) -> list[int]:
        """As vLLM gives them to the samples of one request."""
        return [seed for request in self.asked for seed in range(request.seed, request.seed + request.n)]


def made_prompt(*, num_samples: int = 4, length: int = 1) -> Prompt:
    return Prompt(0, 2, "a", np.full(length, 5, np.int32), {}, num_samples, 100)


def generate_of(engine: Noted, prompt: Prompt, **limits) -> PromptGenerate:
    limits = Limits(**{"max_tokens": 8, "context_length": 20, "deadline_s": 10.0, **limits})
    return PromptGenerate(prompt, LocalActor("engine", 0, lambda index: engine), limits, 0.9, None, "rollout 0 #1")


async def test_every_call_of_a_rollout_draws_afresh():
    """A turn that is drawn for the whole group counts as one of each sample: their next has other seeds."""
    engine, prompt = Noted(), made_prompt()
    generate = generate_of(engine, prompt)
    await generate(prompt.token_ids, n=4)
    for sample in range(4):
        await generate(prompt.token_ids, sample=sample)
    await generate(prompt.token_ids, n=2, sample=1)
    await generate(prompt.token_ids, n=2, sample=2)
    assert len(engine.seeds) == len(set(engine.seeds)) == 12 and engine.seeds[:4] == [100, 101, 102, 103]


async def test_a_rollout_that_begins_anew_draws_what_it_drew_the_first_time():
    engine, prompt = Noted(), made_prompt()
    generate = generate_of(engine, prompt)
    for _ in range(2):
        await generate(prompt.token_ids, n=4)
        await generate(prompt.token_ids, sample=1)
        generate.restart()
    assert engine.seeds[:5] == engine.seeds[5:]


async def test_a_turn_has_what_is_left_of_the_response_and_of_the_engines_context():
    engine, prompt = Noted(), made_prompt(length=10)
    generate = generate_of(engine, prompt)
    await generate(prompt.token_ids)                              # 8 of the response, 10 of the context
    await generate(np.full(13, 5, np.int32))                      # 3 are used
    await generate(np.full(13, 5, np.int32), max_tokens=2)
    await generate_of(engine, prompt, context_length=15)(np.full(13, 5, np.int32))
    assert [request.max_tokens for request in engine.asked] == [8, 5, 2, 2]
    for full in (await generate(np.full(18, 5, np.int32), n=2),
                 await generate_of(engine, prompt, context_length=15)(np.full(15, 5, np.int32), n=2)):
        assert [(turn.num_tokens, turn.finish_reason) for turn in full] == [(0, FINISH_LENGTH)] * 2
    assert len(engine.asked) == 4, "an engine is not asked for an empty turn"


@pytest.mark.parametrize(("own", "asked"), [(None, 8), (3, 3)])
def test_a_prompt_s_own_limit_takes_the_place_of_the_run_s(own, asked):
    limits = Limits(8, 20, 1.0).of(replace(made_prompt(length=10), max_tokens=own))
    assert limits.response_tokens(10, prompt_length=10) == asked
    assert limits.response_tokens(12, prompt_length=10) == asked - 2


async def test_an_engine_is_told_the_tokens_the_temperature_and_who_asks():
    engine, prompt = Noted(), made_prompt()
    generate = generate_of(engine, prompt)
    await generate([5, 6, 7], n=3)
    await generate([5], sample=1)
    (asked, _) = engine.asked
    assert asked.token_ids.tolist() == [5, 6, 7] and asked.token_ids.dtype == np.int32
    assert (asked.n, asked.temperature, asked.owner, asked.probes) == (3, 0.9, "rollout 0 #1", False)
    assert generate.step == 9, "of the newest policy that answered, and not of the last"


def sampling_over(engine: Noted, **options) -> tuple[Sampling, Members]:
    config = from_dict({"rollout.max_tokens": 8, "rollout.temperature": 0.9, **options})
    members = Members(1, {"engine": (LocalActor("engine", 0, lambda index: engine),)})
    return Sampling(config, tokenizer=tiny_tokenizer(), tokenizer_path="unused"), members


async def test_a_rollout_that_takes_too_long_is_told_with_its_engine_and_its_row():
    engine = Noted(answers_after_s=30.0)
    sampling, members = sampling_over(engine, **{"rollout.deadline_s": 0.2})
    await sampling.start(members)
    late = r"^engine 0: prompt row 3 \(from 1\) took longer than rollout\.deadline_s=0\.2 s$"
    with pytest.raises(TimeoutError, match=late):
        await sampling.sample(Assignment(made_prompt(), 0, 0, 4), members, "rollout 0 #1")
    await asyncio.sleep(0.05)
    assert engine.cancelled == len(engine.asked) == 1, "nobody waits for its request any more"


async def test_an_assignment_to_an_engine_in_whose_place_another_one_stands_is_given_back():
    engine = Noted()
    sampling, members = sampling_over(engine)
    await sampling.start(members)
    standing = members.of("engine")[0].incarnation
    await sampling.sample(Assignment(made_prompt(), 0, 0, 4, incarnation=standing), members, "rollout 0 #1")
    with pytest.raises(EngineLost, match="another engine 0 stands there by now") as given_back:
        await sampling.sample(Assignment(made_prompt(), 0, 0, 4, incarnation="of before"), members, "rollout 0 #1")
    assert given_back.value.incarnation == "", "nobody is to be replaced"
    assert len(engine.asked) == 1


async def test_a_rollout_that_gives_up_by_itself_is_not_told_as_late(monkeypatch):
    async def gives_up(prompt, generate):
        raise TimeoutError("the tool did not answer")

    sampling, members = sampling_over(Noted())
    await sampling.start(members)
    monkeypatch.setattr(sampling, "_function", gives_up)
    with pytest.raises(TimeoutError, match=r"^the tool did not answer$"):
        await sampling.sample(Assignment(made_prompt(), 0, 0, 4), members, "rollout 0 #1")


async def test_a_rollout_that_gives_another_number_of_trajectories_is_refused(monkeypatch):
    async def gives_one(prompt, generate):
        return (await single_turn(prompt, generate))[:1]

    sampling, members = sampling_over(Noted())
    await sampling.start(members)
    monkeypatch.setattr(sampling, "_function", gives_one)
    with pytest.raises(UserError, match=r"^rollout\.function=single_turn gave 1 trajectories for row 3 \(from 1\); it "
                                        r"must give prompt\.num_samples=4$"):
        await sampling.sample(Assignment(made_prompt(), 0, 0, 4), members, "rollout 0 #1")


async def test_an_evaluation_has_a_temperature_of_its_own_and_a_probe_goes_first():
    engine = Noted()
    sampling, members = sampling_over(engine)
    await sampling.start(members)
    trajectories, step = await sampling.sample(Assignment(made_prompt(), 0, 0, 4), members, "rollout 0 #1")
    assert len(trajectories) == 4 and step == 9
    await sampling.sample(Assignment(made_prompt(), 0, 0, 4, temperature=0.0, evaluates=True), members, "rollout 0 #1")
    (probed,) = await sampling.probe([made_prompt(length=18)], 0, members, "rollout 0 #1")
    sampled, evaluated, probe = engine.asked
    assert (sampled.temperature, evaluated.temperature) == (0.9, 0.0) and not sampled.probes
    assert (probe.probes, probe.temperature, probe.owner) == (True, 0.9, "rollout 0 #1")
    assert (probe.n, probe.max_tokens) == (4, 2), "no more tokens than the engine has a place for"
    assert len(probed.trajectories) == 4
