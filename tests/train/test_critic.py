"""The critic's ranks on real DeepSpeed: values, the clipped loss's gradient, an exact resume; the policy's returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from tests.train.batches import rollout_group, scored
from tests.train.critic_scenarios import CLIP_RANGE, LEARNING_RATE, old_values_of, returns_of
from tests.train.ranks import relative_gap
from tests.train.scenarios import FIRST

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the first test waits for all ranks to end


def by_hand(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Values of the groups by transformers, one sequence at a time; the loss's gradient by autograd in float64."""
    hf = AutoModelForSequenceClassification.from_pretrained(folder / "scorer").double()
    losses, values, wanted, old = [], {}, [], []
    for uid in FIRST:
        group = rollout_group(uid)
        for i, t in enumerate(group.trajectories):
            hidden = hf.base_model(input_ids=torch.from_numpy(t.token_ids).long()[None])[0][0]
            mask = torch.from_numpy(t.loss_mask)
            values_T = torch.cat([torch.zeros(1).double(), hf.score(hidden)[:-1, 0]]) * mask
            values[f"{uid}.{i}"] = values_T.detach().numpy()
            r, v = (torch.from_numpy(of(group)[i]).double()[mask] for of in (returns_of, old_values_of))
            now = values_T[mask]
            clipped = v + (now - v).clamp(-CLIP_RANGE, CLIP_RANGE)
            losses.append(0.5 * torch.maximum((now - r) ** 2, (clipped - r) ** 2))
            wanted.append(r.numpy())
            old.append(v.numpy())
    torch.cat(losses).mean().backward()
    grads = {name: p.grad.numpy() for name, p in hf.named_parameters()}
    return values, grads, np.concatenate(wanted), np.concatenate(old)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_values_and_gradient(folder, two, stage):
    values, grads, wanted, old = by_hand(folder)
    got = load_file(folder / f"values_{stage}.safetensors")
    assert set(got) == {f"{uid}.{i}" for uid in FIRST[:4] for i in range(4)}
    for name, row in got.items():
        np.testing.assert_allclose(row, values[name], atol=1e-5)
    assert relative_gap(load_file(folder / f"critic_{stage}.safetensors"), grads) <= 1e-5
    metrics = two[stage]
    assert metrics["critic/return_mean"] == pytest.approx(wanted.mean(), abs=1e-6)
    assert metrics["critic/value_mean"] == pytest.approx(old.mean(), abs=1e-6)
    assert metrics["critic/explained_variance"] == pytest.approx(1 - np.var(wanted - old) / np.var(wanted), abs=1e-5)
    assert metrics["critic/learning_rate"] == LEARNING_RATE and 0 < metrics["critic/clip_frac"] < 1
    assert metrics["critic/grad_norm"] > 0 and not any(name.startswith("train/") for name in metrics)


def test_resume_is_exact(folder, two):
    assert two["resume"]["resumed"] == two["resume"]["went_on"]
    assert (two["resume"]["updates"], two["resume"]["step"]) == (8, 2)
    went_on, again = (load_file(folder / f"critic_{name}.safetensors") for name in ("went_on", "resumed"))
    assert "score.weight" in again and all(np.array_equal(again[name], w) for name, w in went_on.items())
    hf = AutoModelForSequenceClassification.from_pretrained(folder / "critic").state_dict()
    assert all(np.array_equal(hf[name].numpy(), w) for name, w in went_on.items())


def test_the_policy_leaves_the_returns_of_gae(folder, two):
    """γ 0.9, λ 0.8, each written out: R = A + V, and 0 for what isn't in the loss."""
    got = load_file(folder / "returns.safetensors")
    for uid in FIRST[:4]:
        group = rollout_group(uid)
        rewards, values = scored(group).rewards, old_values_of(group)
        for i, t in enumerate(group.trajectories):
            tokens = np.flatnonzero(t.loss_mask)
            want = np.zeros(t.num_tokens)
            advantage, following = 0.0, 0.0
            for k in tokens[::-1]:
                reward = rewards[i] if k == tokens[-1] else 0.0
                advantage = reward + 0.9 * following - values[i][k] + 0.9 * 0.8 * advantage
                following = values[i][k]
                want[k] = advantage + values[i][k]
            np.testing.assert_allclose(got[f"{uid}.{i}"], want, atol=1e-5)
    metrics = two["policy"]["metrics"]
    assert metrics["actor/adv_mean"] == pytest.approx(0, abs=1e-6)   # whitened over both ranks
    assert metrics["actor/adv_std"] == pytest.approx(1, abs=1e-4)


def test_in_the_warm_up_the_policy_stays_as_it_is(two):
    assert two["policy"]["moved"] is False and two["policy"]["step"] == 2
    assert "actor/loss" not in two["policy"]["warm_up"]


def test_an_adapters_gradient_is_the_same_sharded_and_recomputed(folder, two):
    got, wanted = (load_file(folder / f"critic_lora_{stage}.safetensors") for stage in ("3", "0"))
    assert relative_gap(got, wanted) <= 1e-6
    assert [name for name in wanted if "lora_" not in name] == ["score.weight"]
    assert any("lora_A" in name and value.any() for name, value in wanted.items())


def test_with_an_adapter_the_kl_in_the_reward_is_to_the_policy_without_it(two):
    first, second = two["policy_with_adapter"]["steps"]
    assert first["actor/reward_kl"] == 0.0 and second["actor/reward_kl"] != 0.0


def test_the_weight_of_that_kl_is_not_adapted_while_a_critic_learns_alone(two):
    during, after = two["policy_with_adapter"]["coefs"]
    assert during == 0.1 and 0.0 < after < 0.1
