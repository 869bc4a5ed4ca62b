"""Groups that were rolled out elsewhere: as a rollout's records, and what is refused by its row."""

from __future__ import annotations

import numpy as np
import pytest

from flux_ray.config import from_dict
from flux_ray.data import GroupSource, are_groups
from flux_ray.data.sets import TRAIN, read_sets
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

GOOD = {"prompt": "1+1=", "responses": ["2", "11", ""], "rewards": [1.0, 0, None]}


def source(tokenizer, rows, *, filter_reward=None, context_length=30, **data):
    config = from_dict({"data": {"shuffle": False, **data}, "filter.reward": filter_reward})
    (loaded,) = read_sets(config, TRAIN, rows)
    assert are_groups(loaded.rows)
    return GroupSource(loaded, tokenizer, context_length=context_length)


def test_a_group_as_a_rollout_would_give_it(plain_tokenizer):
    (offline,) = source(plain_tokenizer, [GOOD]).batch(0, 1)
    group, scored = offline.group, offline.scored
    texts = [plain_tokenizer.decode(t.token_ids[t.prompt_length:]) for t in group.trajectories]
    assert texts == ["2<eos>", "11<eos>", "<eos>"]
    assert plain_tokenizer.decode(group.prompt.token_ids) == "1+1=" and group.prompt.num_samples == 3
    np.testing.assert_array_equal(scored.rewards, [1.0, 0.0, np.nan])
    assert scored.num_tokens.tolist() == [6, 7, 5] and scored.num_loss_tokens.tolist() == [2, 3, 1]
    assert not scored.truncated.any() and scored.oldest_version == -1
    for trajectory in group.trajectories:   # nobody recorded them: whoever would use them shows
        assert np.isnan(trajectory.sampler_logprobs[trajectory.loss_mask]).all()
        assert (trajectory.versions == -1).all()


def test_a_chat(chat_tokenizer):
    row = {"prompt": [{"role": "user", "content": "hi"}], "rewards": [1, 2],
           "responses": ["a", [{"role": "assistant", "content": "b"}]]}
    (offline,) = source(chat_tokenizer, [row], context_length=60).batch(0, 1)
    texts = [chat_tokenizer.decode(t.token_ids) for t in offline.group.trajectories]
    assert texts == ["[user]hi<eos>\n[assistant]a<eos>", "[user]hi<eos>\n[assistant]b<eos>"]


def test_every_position_of_the_run_has_a_uid_of_its_own(plain_tokenizer):
    groups = source(plain_tokenizer, [GOOD, {**GOOD, "rewards": [0, 0, 1]}]).batch(1, 3)
    assert [g.scored.uid for g in groups] == [g.group.prompt.uid for g in groups] == [3, 4, 5]
    assert [g.group.prompt.row for g in groups] == [1, 0, 1]


def test_sizes_may_differ_and_groups_of_one_reward_may_be_left_out(plain_tokenizer):
    rows = [GOOD, {"prompt": "a", "responses": ["b", "c"], "rewards": [1, 1]}]
    assert source(plain_tokenizer, rows).sizes == {2, 3}
    filtered = source(plain_tokenizer, rows, filter_reward="task")
    assert filtered.sizes == {3} and filtered.warnings() == ["prompts in memory: groups left out: 1 same_reward"]
    with pytest.raises(UserError, match="no group is left: 1 same_reward"):
        source(plain_tokenizer, rows[1:], filter_reward="task")


@pytest.mark.parametrize(("change", "message"), [
    ({"rewards": [1.0]}, "column 'rewards': 1 rewards for 3 responses"),
    ({"rewards": None}, "column 'rewards': must be a list that isn't empty, got None"),
    ({"responses": []}, "column 'responses': must be a list that isn't empty"),
    ({"rewards": [1.0, "x", 0.0]}, "column 'rewards': a reward must be a finite number or null, got 'x'"),
    ({"rewards": [1.0, True, 0.0]}, "a reward must be a finite number or null, got True"),
    ({"responses": ["a", 3, "b"]}, "column 'responses': must be text or a list of messages, got int 3"),
    ({"prompt": " "}, "column 'prompt': empty"),
    ({"responses": ["a" * 30, "b", "c"]}, "35 tokens, more than the context of 30"),
])
def test_bad_rows_by_number(plain_tokenizer, change, message):
    rows = [GOOD, {**GOOD, **change}]
    with pytest.raises(UserError, match=r"row 2 \(from 1\)") as caught:
        source(plain_tokenizer, rows)
    assert message in str(caught.value)
    kept = source(plain_tokenizer, rows, on_bad_row="skip")
    assert kept.num_rows == 1 and kept.warnings() == ["prompts in memory: groups left out: 1 bad"]
