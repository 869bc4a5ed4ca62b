import numpy as np
import pytest
import torch

from flux_ray.batch import (
    balance,
    make_micro_batch,
    pack,
    padded_mask,
    pair_samples,
    to_flat,
    to_padded,
    without_weight,
)
from flux_ray.records import PreferencePair, Sample

pytestmark = pytest.mark.unit


def samples_of(seed, count=40, longest=30, *, optional=True):
    """Random samples: holes in masks, some without any loss token."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(2, longest + 1))
        mask = np.zeros(length, bool)
        mask[int(rng.integers(1, length)):] = True
        mask &= rng.random(length) < 0.8
        mask &= i % 7 != 3
        floats = lambda mask=mask: np.where(mask, rng.normal(size=len(mask)), 0).astype(np.float32)  # noqa: E731
        made.append(Sample(
            token_ids=rng.integers(0, 99, length).astype(np.int32), loss_mask=mask, loss_weights=floats(),
            advantages=floats() if optional else None, sampler_logprobs=floats() if optional else None,
            current_version=bool(i % 2)))
    return made


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("max_samples", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_pack_holds_every_sample_once_within_the_budget(padded, max_samples, seed):
    samples = samples_of(seed)
    budget = 64
    packed = pack(samples, max_tokens=budget, max_samples=max_samples, padded=padded)
    ids = [i for mb in packed for i in mb.sample_ids_B.tolist()]
    assert sorted(ids) == list(range(len(samples)))
    for mb in packed:
        assert (mb.num_padded_tokens if padded else mb.num_tokens) <= budget
        assert max_samples is None or mb.num_sequences <= max_samples
        assert mb.num_padded_tokens == mb.num_sequences * max(mb.lengths_B.tolist())
    again = pack(samples, max_tokens=budget, max_samples=max_samples, padded=padded)
    assert [mb.sample_ids_B.tolist() for mb in again] == [mb.sample_ids_B.tolist() for mb in packed]


@pytest.mark.parametrize("padded", [True, False])
def test_pack_is_not_wasteful(padded):
    samples = samples_of(5, count=200)
    packed = pack(samples, max_tokens=128, padded=padded)
    tokens = sum(s.num_tokens for s in samples)
    assert len(packed) <= 1.3 * tokens / 128 + 1
    assert sum(mb.num_padded_tokens for mb in packed) <= 1.2 * tokens or not padded


def test_lengths_with_a_long_tail_are_padded_little():
    """64 log-normal lengths, sigma 0.8: micro-batches that are filled to the budget would be a fifth padding."""
    lengths = np.exp(np.random.default_rng(0).normal(5.2, 0.8, 64)).astype(int) + 16
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, bool), np.ones(n, np.float32)) for n in lengths]
    packed = pack(samples, max_tokens=4608, padded=True)
    assert sum(mb.num_padded_tokens for mb in packed) <= sum(lengths) / 0.95
    assert len(packed) < 32, "a micro-batch costs something too"
    alike = pack([samples[0]] * 8, max_tokens=10**6, padded=True)
    assert len(alike) == 1, "nothing is saved by cutting equal lengths"


@pytest.mark.parametrize("padded", [True, False])
def test_a_sample_beyond_the_budget_is_alone(padded):
    samples = samples_of(6, count=10, longest=8) + samples_of(7, count=1, longest=500)
    assert samples[-1].num_tokens > 16
    packed = pack(samples, max_tokens=16, padded=padded)
    alone = next(mb for mb in packed if 10 in mb.sample_ids_B.tolist())
    assert alone.sample_ids_B.tolist() == [10]
    assert pack([], max_tokens=16, padded=padded) == []


def test_a_micro_batch_is_its_samples_side_by_side():
    samples = samples_of(8, count=5)
    mb = make_micro_batch(samples, sample_ids=[4, 0, 2, 1, 3])
    assert mb.token_ids_S.tolist() == [t for s in samples for t in s.token_ids.tolist()]
    assert mb.position_ids_S.tolist() == [t for s in samples for t in range(s.num_tokens)]
    assert mb.loss_mask_S.tolist() == [t for s in samples for t in s.loss_mask.tolist()]
    assert mb.advantages_S.tolist() == [t for s in samples for t in s.advantages.tolist()]
    assert mb.lengths_B.tolist() == [s.num_tokens for s in samples]
    assert mb.current_version_B.tolist() == [s.current_version for s in samples]
    assert (mb.token_ids_S.dtype, mb.loss_weights_S.dtype) == (torch.int64, torch.float32)
    assert mb.reference_logprobs_S is None and mb.num_tokens == sum(s.num_tokens for s in samples)
    assert mb.to("cpu").sample_ids_B.tolist() == [4, 0, 2, 1, 3]
    with pytest.raises(AssertionError, match="some samples have and others lack"):
        make_micro_batch([samples[0], samples_of(8, count=1, optional=False)[0]], sample_ids=[0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_the_response_view_by_hand(seed):
    samples = samples_of(seed, count=9)
    mb = make_micro_batch(samples, sample_ids=range(9))
    values = torch.randn(mb.num_tokens, dtype=torch.float64)
    view = to_padded(values, mb)
    starts = [int(np.flatnonzero(s.loss_mask)[0]) if s.loss_mask.any() else s.num_tokens for s in samples]
    widths = [s.num_tokens - start for s, start in zip(samples, starts, strict=True)]
    assert view.shape == (9, max(widths)) and view.dtype == torch.float64
    offset = 0
    for row, s, start, width in zip(view, samples, starts, widths, strict=True):
        assert row[:width].tolist() == values[offset + start: offset + s.num_tokens].tolist()
        assert (row[width:] == 0).all()
        offset += s.num_tokens
    assert padded_mask(mb).sum() == mb.loss_mask_S.sum()
    assert to_padded(mb.token_ids_S, mb).dtype == torch.int64
    # There and back: what the view holds is as it was, the rest is zero; loss tokens are all in the view.
    flat = to_flat(view, mb)
    assert ((flat == values) | (flat == 0)).all() and (flat[mb.loss_mask_S] == values[mb.loss_mask_S]).all()
    assert torch.equal(to_padded(flat, mb), view)


def test_the_views_are_differentiable():
    mb = make_micro_batch(samples_of(9, count=4, longest=6), sample_ids=range(4))
    values = torch.randn(mb.num_tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: to_padded(v, mb) ** 2, values)
    view = to_padded(values, mb).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: to_flat(v, mb) ** 2, view)


def test_nan_outside_the_view_stays_outside():
    samples = samples_of(10, count=4)
    mb = make_micro_batch(samples, sample_ids=range(4))
    first = int(np.flatnonzero(samples[0].loss_mask)[0])
    values = torch.ones(mb.num_tokens)
    values[:first] = torch.nan
    values.requires_grad_()
    to_padded(values, mb).sum().backward()
    assert to_padded(values, mb).isfinite().all() and values.grad.isfinite().all()


def test_a_micro_batch_without_weight_has_a_shape_and_a_graph_alone():
    idle = without_weight()
    assert idle.num_tokens == 2 and not idle.loss_mask_S.any() and not idle.loss_weights_S.any()
    values = torch.ones(2, requires_grad=True)
    view = to_padded(values, idle)
    assert view.shape == (1, 1) and not padded_mask(idle).any()
    view.sum().backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_balance(seed, num_ranks):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 1000, int(rng.integers(1, 60))).tolist()
    items = balance(tokens, num_ranks)
    assert sorted(i for mine in items for i in mine) == list(range(len(tokens)))
    counts = [len(mine) for mine in items]
    assert max(counts) - min(counts) <= 1
    assert all(mine == sorted(mine) for mine in items)
    if len(tokens) >= 4 * num_ranks and len(tokens) % num_ranks == 0:
        loads = [sum(tokens[i] for i in mine) for mine in items]
        assert max(loads) - min(loads) <= max(tokens)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_have_the_same_work_to_a_few_percent(num_ranks):
    """Groups of eight log-normal lengths: the fullest of 8 ranks has 1 % more than the mean (17 % as they come)."""
    rng = np.random.default_rng(0)
    fullest = []
    for _ in range(20):
        tokens = (256 * rng.lognormal(-0.32, 0.8, (8 * num_ranks, 8))).sum(1).round().astype(int).tolist()
        loads = [sum(tokens[i] for i in mine) for mine in balance(tokens, num_ranks)]
        fullest.append(max(loads) * num_ranks / sum(tokens))
    assert np.median(fullest) <= 1.02 and max(fullest) <= 1.08


def test_balance_evens_out_what_arrival_order_would_not():
    assert balance([100, 90, 10, 20], 2) == [[0, 2], [1, 3]]
    assert balance([5, 5, 5, 5, 5], 2) == [[0, 2, 4], [1, 3]]
    assert balance([7], 3) == [[0], [], []]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("max_samples", [None, 1, 5])
def test_a_unit_stays_side_by_side(padded, max_samples):
    samples = samples_of(12, count=20)
    batches = pack(samples, max_tokens=150, max_samples=max_samples, padded=padded, unit=2)
    ids = [mb.sample_ids_B.tolist() for mb in batches]
    assert sorted(i for chosen in ids for i in chosen) == list(range(20))
    for mb, chosen in zip(batches, ids, strict=True):
        assert all(second == first + 1 and first % 2 == 0
                   for first, second in zip(chosen[::2], chosen[1::2], strict=True))
        cost = mb.num_padded_tokens if padded else mb.num_tokens
        assert cost <= 150 or len(chosen) == 2
        assert max_samples is None or len(chosen) <= max(max_samples, 2)
    assert len(batches) < 10 or max_samples == 1


@pytest.mark.parametrize("last_token", [False, True])
def test_samples_of_pairs(last_token):
    pair = PreferencePair(0, 2, np.array([5, 6, 4, 3, 2], np.int32), np.array([5, 6, 2], np.int32))
    chosen, rejected = pair_samples([pair], scored_at=(lambda ids: len(ids) - 1) if last_token else None)
    assert chosen.token_ids is pair.chosen_ids and rejected.token_ids is pair.rejected_ids
    assert chosen.loss_mask.tolist() == [False, False, *([False] * 2 if last_token else [True] * 2), True]
    assert rejected.loss_mask.tolist() == [False, False, True] and not chosen.loss_weights.any()
