"""Steps on pairs on real DeepSpeed: the same gradient however it is computed, a resume that changes nothing, and a
reward model that transformers opens with equal scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.train.batches import pairs
from tests.train.ranks import relative_gap

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the first test waits for all ranks to end
OBJECTIVES = ("dpo", "ipo", "reward_model")
COUNT = 8


def tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"pairs_{name}.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_gradients(folder, two, one, objective):
    """Of two ranks at three ZeRO stages, micro-batches of one pair and of all, and packed in one row."""
    wanted = tensors(folder, objective)
    variants = [name for name in (*two, *one) if name.startswith(f"{objective}_") and name != objective]
    assert len(variants) >= 4 and max(np.abs(g).max() for g in wanted.values()) > 1e-4
    for name in variants:
        assert relative_gap(tensors(folder, name), wanted) <= 2e-6, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_measured_alone_is_what_the_step_measures(two, one, objective):
    result = one[objective]
    assert result["before"] == pytest.approx({name: result["step"][name] for name in result["before"]}, abs=1e-5)
    of_two = next(two[name] for name in two if name.startswith(f"{objective}_zero"))
    assert of_two["before"] == pytest.approx(result["before"], abs=1e-5)   # a mean over both ranks


def sums_by_hand(folder: Path) -> list[tuple[float, ...]]:
    """log p of both responses of each pair, as transformers has it."""
    hf = AutoModelForCausalLM.from_pretrained(folder / "tied")
    of_pairs = []
    for pair in pairs(1, COUNT):
        sums = []
        for token_ids in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(token_ids).long()[None]
            with torch.no_grad():
                log_p = hf(input_ids=ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(log_p[pair.prompt_length - 1:].sum()))
        of_pairs.append(tuple(sums))
    return of_pairs


def test_the_implicit_reward_by_hand(folder, one):
    """beta 0.1 of the scenarios; the reference's sums as they are made there."""
    margins = [0.1 * ((w + 3 + i) - (l + 4 - i)) for i, (w, l) in enumerate(sums_by_hand(folder))]
    assert one["dpo"]["before"]["pairs/margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert one["dpo"]["before"]["pairs/accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_with_an_adapter_the_reference_is_the_policy_without_it(folder, one):
    before, after = one["without_adapter"]
    np.testing.assert_allclose(before, sums_by_hand(folder), atol=1e-4)
    assert after == before   # the adapter has learned, what is under it stays


@pytest.mark.parametrize("objective", ["dpo", "reward_model"])
def test_an_adapters_gradient_is_the_same_sharded_and_recomputed(folder, two, one, objective):
    """Two ranks, ZeRO-3 and gradient checkpointing together; a reward model's head is trained beside its factors."""
    got, wanted = tensors(folder, f"{objective}_lora_sharded"), tensors(folder, f"{objective}_lora")
    assert relative_gap(got, wanted) <= 2e-6
    assert any("lora_A" in name and value.any() for name, value in wanted.items())
    wholly = [name for name in wanted if "lora_" not in name]
    assert wholly == ([] if objective == "dpo" else ["score.weight"])
    packing = {"train/num_micro_batches", "train/padding_frac"}
    measured, alone = ({k: v for k, v in of[name].items() if k not in packing} for of, name in (
        (two["adapted"], f"{objective}_lora_sharded"), (one["adapted"], f"{objective}_lora")))
    assert measured == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "reward_model"])
def test_a_resume_changes_nothing(folder, two, objective):
    result = two["resume"][objective]
    assert result["went_on"] == result["resumed"]
    went_on, resumed = tensors(folder, f"went_on_{objective}"), tensors(folder, f"resumed_{objective}")
    assert all(np.array_equal(went_on[name], resumed[name]) for name in went_on)


def test_a_reward_model_is_transformers_own(folder, two):
    saved = two["saved"]
    assert saved["losses"][-1] < 0.8 * saved["losses"][0]
    assert saved["again"] == pytest.approx(saved["measured"], abs=1e-5)
    hf = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    ids = [ids for pair in pairs(1, COUNT) for ids in (pair.chosen_ids, pair.rejected_ids)]
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), hf.config.pad_token_id)
    for row, own in zip(padded, ids, strict=True):
        row[: len(own)] = torch.from_numpy(own)
    with torch.no_grad():
        scores = hf(input_ids=padded, attention_mask=(padded != hf.config.pad_token_id).long()).logits.view(-1, 2)
    rewards = [saved["measured"][f"pairs/{which}_reward"] for which in ("chosen", "rejected")]
    assert rewards == pytest.approx(scores.mean(0).tolist(), abs=1e-5)
    assert saved["measured"]["pairs/accuracy"] == pytest.approx(float((scores[:, 0] > scores[:, 1]).float().mean()))
