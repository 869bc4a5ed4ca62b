"""The training group on real DeepSpeed: the same gradient however it is computed, and a resume that changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_model
from tests.train.batches import rollout_group, supervised
from tests.train.ranks import launch, relative_gap

pytestmark = pytest.mark.system
STAGES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(folder / "tied", tied=True)
    tiny_model(folder / "untied", tied=False)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return launch("two_ranks", 2, folder)


@pytest.fixture(scope="module")
def one(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    return launch("one_rank", 1, folder)


def tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", [
    "micro_1", "micro_8", "checkpointing", "zero_0", "zero_1", "zero_2", "zero_3", "idle_0", "idle_3",
    "zero_3_checkpointing",
])
def test_equal_gradients(folder: Path, two: dict, one: dict, name: str) -> None:
    assert relative_gap(tensors(folder, name), tensors(folder, "one")) <= 1e-6


def test_packed_against_padded(folder: Path, two: dict, one: dict) -> None:
    assert relative_gap(tensors(folder, "block_diagonal"), tensors(folder, "one")) <= 1e-5


@pytest.mark.parametrize("name", ["zero_0", "zero_2", "idle_3"])
def test_metrics_do_not_depend_on_ranks(two: dict, one: dict, name: str) -> None:
    packing = {"train/num_micro_batches", "train/padding_frac"}
    wanted = {k: v for k, v in one["one"].items() if k not in packing}
    got = {k: v for k, v in two[name].items() if k not in packing}
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for metric in ("actor/grpo_kl", "actor/entropy", "weights/logprob_gap_max", "train/grad_norm"):
        assert got[metric] > 0


@pytest.mark.parametrize("name", [*STAGES, "bf16"])
def test_resume_is_exact(folder: Path, two: dict, name: str) -> None:
    reports = two["resume_bf16"] if name == "bf16" else two["resume"][name]
    assert reports["resumed"].pop("version") == 2
    assert reports["resumed"] == reports["went_on"]
    went_on, again = tensors_of(folder, f"went_on_{name}"), tensors_of(folder, f"resumed_{name}")
    assert all(torch.equal(again[k], went_on[k]) for k in went_on)


def tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load_torch

    return load_torch(folder / f"{name}.safetensors")


def test_resume_with_another_world_size_and_stage(folder: Path, two: dict, one: dict) -> None:
    assert relative_gap(tensors(folder, "resumed_elsewhere"), tensors(folder, "went_on_3")) <= 1e-6
    went_on = two["resume"]["3"]["went_on"]
    assert one["resumed_elsewhere"]["actor/loss"] == pytest.approx(went_on["actor/loss"], rel=1e-5)


def test_a_checkpoint_holds_no_pickle(folder: Path, two: dict) -> None:
    files = sorted(p.name for p in (folder / "checkpoint_3").iterdir())
    assert files == ["model.safetensors", "random.safetensors", "state.json"]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_saved_model_is_what_was_trained(folder: Path, two: dict, model: str) -> None:
    saved = folder / f"saved_{model}"
    hf = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert AutoTokenizer.from_pretrained(saved)("12+3").input_ids == [4, 5, 13, 6]
    assert hf.generation_config.eos_token_id == 1
    rows = tensors(folder, f"logprobs_{model}")
    for g in range(3):
        for i, t in enumerate(rollout_group(g).trajectories):
            ids = torch.from_numpy(t.token_ids).long()[None]
            log_p = torch.log_softmax(hf(input_ids=ids).logits[0].float() / 0.7, -1)
            wanted = np.zeros(t.num_tokens, np.float32)
            wanted[1:] = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
            np.testing.assert_allclose(rows[f"{g}.{i}"], np.where(t.loss_mask, wanted, 0), atol=1e-5)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_weights_go_out_whole_by_checkpoint_name(folder: Path, two: dict, model: str) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folder / model)
    wanted = [[name, "torch.float32", list(w.shape)] for name, w in hf.state_dict().items()
              if model == "untied" or name != "lm_head.weight"]
    assert two["saved"][model]["metadata"] == wanted
    assert two["saved"][model]["given"] == wanted


def test_several_updates_with_kl_in_the_reward(two: dict) -> None:
    metrics = two["several"]
    assert metrics["num_updates"] == 4
    assert metrics["actor/ratio_mean"] != 1.0 and metrics["actor/old_kl"] != 0.0  # the policy moved between updates
    assert metrics["weights/logprob_gap_max"] == pytest.approx(two["zero_0"]["weights/logprob_gap_max"], rel=1e-5)


def test_an_adapted_kl_coef_is_of_all_ranks_and_in_the_checkpoint(two: dict) -> None:
    """23 sequences with a loss token, on both ranks; their KL is far from its target, to the side of its sign."""
    metrics = two["several"]
    assert metrics["actor/kl_coef"] == 0.05 and abs(metrics["actor/reward_kl"]) > 0.01
    error = 0.2 if metrics["actor/reward_kl"] > 0 else -0.2
    assert metrics["next_kl_coef"] == [pytest.approx(0.05 * (1 + error * 23 / 100), rel=1e-12)] * 2


def test_supervised_steps(folder: Path, two: dict) -> None:
    losses = two["sft"]["losses"]
    hf = AutoModelForCausalLM.from_pretrained(folder / "untied")
    total = count = 0.0
    for sample in [*supervised(7, 5), *supervised(8, 3)]:
        ids = torch.from_numpy(sample.token_ids).long()[None]
        log_p = torch.log_softmax(hf(input_ids=ids).logits[0].float(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(sample.loss_mask)[1:]
        total, count = total - float(log_p[mask].sum()), count + int(mask.sum())
    assert losses[0] == pytest.approx(total / count, rel=1e-5)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_fp32_master_weights(folder: Path, two: dict, one: dict, stage: str) -> None:
    result = two["bf16"][stage]
    assert result["types"] == ["torch.bfloat16"]
    assert result["fine"] > 0
    assert math.isfinite(result["metrics"]["train/grad_norm"])
    assert relative_gap(tensors(folder, f"bf16_{stage}"), tensors(folder, "one")) < 0.1


def test_what_is_not_finite_stops_every_rank(two: dict) -> None:
    for said in two["says"]:
        assert said == ["training update 0: the loss on rank 1 is not finite"] * 2
