import numpy as np
import pytest
import torch

from flux_ray.batch import StepCounts, Weighting, divisor, loss_weights, make_samples, response_views, step_counts
from flux_ray.errors import UserError
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Prompt, RolloutGroup, ScoredGroup, Trajectory

pytestmark = pytest.mark.unit

VERSION = 7


def trajectory(mask, *, versions=VERSION, finish=FINISH_STOP):
    mask = np.array(mask, bool)
    versions = np.where(mask, versions, -1).astype(np.int32)
    logprobs = np.where(mask, -np.arange(len(mask)), 0).astype(np.float32)
    first = int(mask.argmax()) if mask.any() else len(mask)
    return Trajectory(np.arange(len(mask), dtype=np.int32), mask, logprobs, versions, first, finish)


def group(uid, trajectories, rewards):
    prompt = Prompt(uid, 0, "1+1=", trajectories[0].token_ids[:1], {}, len(trajectories), 0)
    scored = ScoredGroup(
        uid, np.array(rewards, float), np.array(rewards, float), {}, np.array([t.num_tokens for t in trajectories]),
        np.array([t.num_loss_tokens for t in trajectories]),
        np.array([t.finish_reason == FINISH_LENGTH for t in trajectories]), VERSION)
    return RolloutGroup(prompt, tuple(trajectories)), scored


def two_groups():
    """Six rows: plain; two turns; truncated; without a score; an empty response; of an older version."""
    first = group(3, [trajectory([0, 0, 1, 1, 1]), trajectory([0, 1, 0, 1]),
                      trajectory([0, 0, 1, 1], finish=FINISH_LENGTH)], [1.0, 0.5, 0.25])
    second = group(9, [trajectory([0, 1, 1]), trajectory([0, 0]),
                       trajectory([0, 1, 1], versions=np.array([0, 6, 7]))], [np.nan, 0.0, 2.0])
    return [first[0], second[0]], [first[1], second[1]]


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_views(mask_truncated):
    groups, scored = two_groups()
    views = response_views(groups, scored, mask_truncated=mask_truncated)
    truncated = [0, 0, 0] if mask_truncated else [1, 1, 0]
    assert views.response_mask_NL.int().tolist() == [[1, 1, 1], [1, 0, 1], truncated, [0, 0, 0], [0, 0, 0], [1, 1, 0]]
    rewards = views.token_level_rewards_NL
    assert rewards[0].tolist() == [0, 0, 1] and rewards[1].tolist() == [0, 0, 0.5] and rewards[5].tolist() == [0, 2, 0]
    assert rewards[2].tolist() == [0, 0.25, 0]          # masked or not, its score is in its group's statistics
    assert rewards[3].isnan().any() and rewards[4].tolist() == [0, 0, 0]
    assert views.index_N.tolist() == [3, 3, 3, 9, 9, 9]


def test_views_there_and_back():
    groups, scored = two_groups()
    views = response_views(groups, scored, mask_truncated=False)
    per_sample = [t.sampler_logprobs for g in groups for t in g.trajectories]
    rows = views.from_samples(per_sample)
    assert rows[0].tolist() == [-2, -3, -4] and rows[1].tolist() == [-1, 0, -3] and rows[4].tolist() == [0, 0, 0]
    for got, want in zip(views.to_samples(rows), per_sample, strict=True):
        assert got.dtype == np.float32 and got.tolist() == want.tolist()


def test_a_rank_without_groups_has_views_too():
    views = response_views([], [], mask_truncated=False)
    assert views.response_mask_NL.shape == views.token_level_rewards_NL.shape == (0, 1)
    assert views.to_samples(torch.zeros(0, 1)) == [] and step_counts([], mask_truncated=False) == StepCounts(0, 0)


def test_samples():
    groups, scored = two_groups()
    counts = step_counts(scored, mask_truncated=True)
    assert counts == StepCounts(num_sequences=3, num_tokens=7)   # rows 0, 1, 5
    reference = [[np.full(t.num_tokens, -9.0, np.float32) for t in g.trajectories] for g in groups]
    advantages = [np.full(t.num_tokens, 0.5, np.float32) for g in groups for t in g.trajectories]
    samples = make_samples(groups, scored, advantages=advantages, reference_logprobs=reference, mask_truncated=True,
                           weighting=Weighting("token_mean", 8), versions=(VERSION,))
    assert [int(s.loss_mask.sum()) for s in samples] == [3, 2, 0, 0, 0, 2]
    assert [s.current_version for s in samples] == [True, True, True, True, True, False]
    assert sum(s.loss_weights.sum() for s in samples) == divisor("token_mean", counts)
    assert all((s.loss_weights[~s.loss_mask] == 0).all() for s in samples)
    assert samples[1].sampler_logprobs.tolist() == [0, -1, 0, -3]
    assert samples[1].reference_logprobs.tolist() == [-9.0] * 4
    assert samples[0].advantages.tolist() == [0.5] * 5
    late = make_samples(groups, scored, advantages=None, reference_logprobs=None, mask_truncated=False,
                        weighting=Weighting("token_mean", 8), versions=(VERSION,))
    assert late[0].advantages is None and late[0].reference_logprobs is None and int(late[2].loss_mask.sum()) == 2


@pytest.mark.parametrize(("versions", "current"), [
    ((VERSION,), [True, True, True, True, True, False]),
    ({6, VERSION, 12}, [True] * 6),
    ([6], [False, False, False, False, True, False]),
])
def test_a_sample_is_current_if_each_of_its_tokens_is_of_a_version_of_the_present_step(versions, current):
    """A run that went back to a step has published its weights more than once. An empty response is of any step."""
    groups, scored = two_groups()
    samples = make_samples(groups, scored, advantages=None, reference_logprobs=None, mask_truncated=False,
                           weighting=Weighting("token_mean", 8), versions=versions)
    assert [s.current_version for s in samples] == current


@pytest.mark.parametrize(("aggregation", "weight"), [
    ("token_mean", lambda n, tokens, length: 1 / tokens),
    ("sequence_mean", lambda n, tokens, length: 1 / (n * length)),
    ("constant_length", lambda n, tokens, length: 1 / (n * 16)),
    ("sequence", lambda n, tokens, length: 1 / (n * length)),
])
def test_weights_of_each_aggregation(aggregation, weight):
    rng = np.random.default_rng(0)
    masks = [rng.random(12) < 0.6 for _ in range(6)] + [np.zeros(12, bool)]
    lengths = [int(m.sum()) for m in masks]
    counts = StepCounts(6, sum(lengths))
    for mask, length in zip(masks, lengths, strict=True):
        got = loss_weights(aggregation, loss_mask=mask, max_tokens=16)
        assert got.dtype == np.float32
        want = np.where(mask, weight(6, sum(lengths), length) if length else 0, 0)
        got = got / np.float32(divisor(aggregation, counts))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        if aggregation == "sequence" and length:
            assert got.sum() == pytest.approx(1 / 6)


def test_an_unknown_aggregation():
    with pytest.raises(UserError, match=r"unknown algo\.aggregation 'token_sum': did you mean 'token_mean'"):
        loss_weights("token_sum", loss_mask=np.ones(2, bool), max_tokens=4)
