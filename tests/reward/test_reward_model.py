"""Reward models: transformers' own scores, whatever tokenizer they have; the worker that asks them beside rules."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flux_ray.cluster.group import Members
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Prompt, Responses, RolloutGroup, Trajectory
from flux_ray.reward.calls import RAISED, TIMED_OUT, RewardError
from flux_ray.reward.model import RewardModel, check_reward_models
from flux_ray.reward.worker import RewardWorker
from flux_ray.rollout.scoring import responses_of
from tests.fakes.actors import LocalGroup
from tests.model.test_score import written
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("policy"), tied=True, context=48)


@pytest.fixture(scope="module")
def judge(policy, tmp_path_factory) -> Path:
    return written(policy, tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def other(policy, tmp_path_factory) -> Path:
    """A reward model whose tokenizer knows fewer characters."""
    folder = written(policy, tmp_path_factory.mktemp("other") / "strange")
    tiny_tokenizer(40).save_pretrained(folder)
    return folder


def responses(policy: Path, texts: list[str], *, prompt="12+30=", cut: tuple[int, ...] = ()) -> Responses:
    """Of a group whose responses are `texts`, each with its end token but for those that are cut."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True)
    start = tokenizer(text).input_ids
    trajectories = []
    for i, response in enumerate(texts):
        ids = start + tokenizer(response).input_ids + ([] if i in cut else [tokenizer.eos_token_id])
        mask = np.arange(len(ids)) >= len(start)
        trajectories.append(Trajectory(np.array(ids, np.int32), mask, np.zeros(len(ids), np.float32),
                                       np.where(mask, 0, -1).astype(np.int32), len(start),
                                       FINISH_LENGTH if i in cut else FINISH_STOP))
    group = RolloutGroup(Prompt(3, 0, prompt, np.array(start, np.int32), {"answer": "42"}, len(texts), 0),
                         tuple(trajectories))
    sampled = [t.token_ids[t.prompt_length :].tolist() for t in trajectories]
    return responses_of(group, tokenizer.batch_decode(sampled, skip_special_tokens=True), step=0)


def served(path: Path, policy: Path, **options) -> RewardModel:
    return RewardModel(str(path), tokenizer_path=str(policy), device="cpu", dtype=torch.float32,
                       **{"max_tokens_per_forward": 64, **options})


def by_transformers(path: Path, rows: list[list[int]]) -> list[float]:
    hf = AutoModelForSequenceClassification.from_pretrained(path).eval()
    batch = AutoTokenizer.from_pretrained(path, padding_side="right").pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        return hf(**batch).logits[:, 0].tolist()


@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
async def test_tokens_go_as_they_are(policy, judge, layout):
    model = served(judge, policy, layout=layout)
    one, two = responses(policy, ["42", "7", "", "123456"], cut=(3,)), responses(policy, ["9" * 12], prompt="1+")
    got = await asyncio.wait_for(asyncio.gather(model.scores(one), model.scores(two)), 30)
    for scores, of in zip(got, (one, two), strict=True):
        wanted = by_transformers(judge, [ids.tolist() for ids in of.token_ids])
        assert scores == pytest.approx(wanted, abs=1e-5)
    assert len(set(got[0])) == 4


async def test_scores_do_not_depend_on_who_asks_at_the_same_moment(policy, judge):
    """To the last bit, or the same seed would not give the same run."""
    model = served(judge, policy, max_tokens_per_forward=10_000)
    asked = [responses(policy, ["42" * n, "7", "123456"[n:]]) for n in range(1, 6)]
    alone = [await asyncio.wait_for(model.scores(one), 30) for one in asked]
    assert await asyncio.wait_for(asyncio.gather(*(model.scores(one) for one in asked)), 30) == alone


async def test_a_model_that_pads_with_its_end_token_is_read_where_transformers_reads_it(policy, judge, tmp_path):
    """Before the end tokens: transformers takes them for padding."""
    hf = AutoModelForSequenceClassification.from_pretrained(judge)
    hf.config.pad_token_id = 1
    hf.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    one = responses(policy, ["42", "7"])
    rows = [ids.tolist() for ids in one.token_ids]
    scores = await asyncio.wait_for(served(tmp_path, policy).scores(one), 30)
    assert scores == pytest.approx(by_transformers(tmp_path, rows), abs=1e-5)
    assert scores != pytest.approx(by_transformers(judge, rows), abs=1e-3)


async def test_with_another_tokenizer_the_text_is_encoded_again(policy, other):
    model, its = served(other, policy), AutoTokenizer.from_pretrained(other)
    one = responses(policy, ["42", "xyz"], cut=(1,))
    rows = [[*its("12+30=42").input_ids, its.eos_token_id], its("12+30=xyz").input_ids]
    assert its.unk_token_id in rows[1]
    assert await asyncio.wait_for(model.scores(one), 30) == pytest.approx(by_transformers(other, rows), abs=1e-5)


async def test_a_chat_goes_through_the_models_own_template(policy, other):
    model, its = served(other, policy), AutoTokenizer.from_pretrained(other)
    its.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    model._its.chat_template = its.chat_template
    scores = await asyncio.wait_for(model.scores(responses(policy, ["ab"], prompt=CHAT)), 30)
    assert scores == pytest.approx(by_transformers(other, [its("[hi][ab]").input_ids]), abs=1e-5)


async def test_a_text_that_is_too_long_is_refused_with_the_numbers(policy, judge):
    with pytest.raises(ValueError, match=r"68 tokens don't fit its context of 48"):
        await served(judge, policy).scores(responses(policy, ["1" * 61]))


def checked(reference: str, policy: Path, **options) -> list[str]:
    values = {"model.path": str(policy), "reward.functions": [reference], "rollout.max_tokens": 16, **options}
    return check_reward_models(from_dict(values), AutoTokenizer.from_pretrained(policy), longest_prompt=32)


def test_what_is_wrong_is_told_at_the_start(policy, judge, other, tmp_path):
    assert checked(f"model:{judge}", policy) == []
    assert checked("numeric", policy) == []
    (warning,) = checked(f"model:{other}", policy)
    assert warning.startswith("reward model strange has another tokenizer than the policy")
    with pytest.raises(UserError, match=r"model:.*: its context is 48 tokens; prompts of up to 32 and "
                                        r"rollout\.max_tokens=17 need 49"):
        checked(f"model:{judge}", policy, **{"rollout.max_tokens": 17})
    with pytest.raises(UserError, match=r"reward\.functions, model:.*is no sequence classification model"):
        checked(f"model:{policy}", policy)
    hf = AutoModelForSequenceClassification.from_pretrained(judge, num_labels=2, ignore_mismatched_sizes=True)
    hf.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has 2 labels"):
        checked(f"model:{tmp_path / 'two'}", policy)
    with pytest.raises(UserError, match=r"model:/not/here.*no such folder"):
        checked("model:/not/here", policy)


class Kind:
    async def scores(self, asked: Responses) -> list[float]:
        if asked.prompt.uid == 4:
            raise RuntimeError("out of memory")
        return [0.25, -1.0]


class Helpful:
    async def scores(self, asked: Responses) -> list[float]:
        await asyncio.sleep(30 if asked.prompt.uid == 5 else 0)
        return [3.0, 4.0]


def of_uid(asked: Responses, uid: int) -> Responses:
    return replace(asked, prompt=replace(asked.prompt, uid=uid))


async def test_a_worker_weighs_models_and_rules(policy):
    """Several models beside a rule, each under its own name; what fails says which it was."""
    references = ["exact_match", "model:/a/kind", "model:/b/helpful/model"]
    config = from_dict({"reward.functions": references, "reward.weights": [1.0, 0.5, -2.0],
                        "reward.deadline_s": 0.3})
    one = responses(policy, ["42", "7"])
    models = LocalGroup("reward_model", lambda index: [Kind, Helpful][index](), 2)
    worker = RewardWorker(config)
    await worker.meet(Members(1, {"reward_model": tuple(models)}))
    scores = await worker.score(one)
    assert scores.rewards.tolist() == [1 + 0.125 - 6, 0 - 0.5 - 8]
    assert scores.parts["kind"].tolist() == [0.25, -1.0] and scores.parts["helpful"].tolist() == [3.0, 4.0]
    with pytest.raises(RewardError, match=r"reward kind, prompt row 1 .*2 samples together: .*RuntimeError: out") as e:
        await worker.score(of_uid(one, 4))
    assert e.value.kind == RAISED
    with pytest.raises(RewardError, match=r"reward helpful.*no value within reward\.deadline_s=0\.3") as e:
        await worker.score(of_uid(one, 5))
    assert e.value.kind == TIMED_OUT


class Replica:
    def __init__(self, index: int) -> None:
        self.index, self.asked = index, 0

    async def scores(self, asked: Responses) -> list[float]:
        self.asked += 1
        await asyncio.sleep(0.2)
        return [float(self.index)] * 2


async def test_replicas_of_a_model_share_its_calls(policy):
    """Replica r of model m is actor m x replicas + r; the one with the fewest calls of this worker is asked."""
    config = from_dict({"reward.functions": ["model:/a/kind", "model:/b/helpful/model"], "reward.model_replicas": 2})
    models = LocalGroup("reward_model", Replica, 4)
    worker = RewardWorker(config)
    await worker.meet(Members(1, {"reward_model": tuple(models)}))
    one = responses(policy, ["42", "7"])
    scored = await asyncio.wait_for(asyncio.gather(*(worker.score(of_uid(one, uid)) for uid in range(4))), 30)
    assert sorted(scores.parts["kind"][0] for scores in scored) == [0, 0, 1, 1]
    assert sorted(scores.parts["helpful"][0] for scores in scored) == [2, 2, 3, 3]
    assert [actor.object.asked for actor in models] == [2, 2, 2, 2]


async def test_a_worker_asks_those_that_it_met_last(policy):
    config = from_dict({"reward.functions": ["model:/a/kind"]})
    worker, one = RewardWorker(config), responses(policy, ["42", "7"])
    for epoch in (1, 2):
        models = LocalGroup("reward_model", lambda index, epoch=epoch: Replica(epoch), 1)
        await worker.meet(Members(epoch, {"reward_model": tuple(models)}))
        assert (await worker.score(one)).rewards.tolist() == [epoch, epoch]
