"""The training group on real DeepSpeed: the same gradient however it is computed, and a resume that changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_ray.model.scoring import scoring_samples
from flux_ray.reference import Reference
from tests.train.batches import rollout_group, supervised
from tests.train.ranks import relative_gap
from tests.train.scenarios import KINDS, STREAMED_KINDS

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the first test waits for all ranks to end
#: ZeRO's stages. What 0, which shards nothing, and 3, which shards all, do alike, 1 and 2 repeat.
STAGES = ("0", "3", *(pytest.param(stage, marks=pytest.mark.all) for stage in "12"))


@pytest.fixture
def measured(two: dict, request: pytest.FixtureRequest) -> dict:
    """The result on two ranks; for a test that repeats, with what it repeats."""
    if not request.node.get_closest_marker("all"):
        return two
    repeats = request.getfixturevalue("repeats")
    return {**two, **{name: {**two.get(name, {}), **of} for name, of in repeats.items()}}


def tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", [
    "micro_1", "micro_8", "checkpointing", "zero_0", "zero_1", "zero_2", "zero_3", "idle_0", "idle_3", "offloaded",
    "zero_3_checkpointing", "reversed",
])
def test_equal_gradients(folder: Path, two: dict, one: dict, name: str) -> None:
    assert relative_gap(tensors(folder, name), tensors(folder, "one")) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_equal_gradients_of_other_kinds(folder: Path, two: dict, one: dict, kind: str) -> None:
    """Over ranks, ZeRO and micro-batches; and it is a gradient of its own."""
    assert relative_gap(tensors(folder, f"{kind}_ranks"), tensors(folder, kind)) <= 1e-6
    assert relative_gap(tensors(folder, kind), tensors(folder, "one")) > 1e-3
    packing = {"train/num_micro_batches", "train/padding_frac"}
    got, wanted = ({k: v for k, v in metrics.items() if k not in packing}
                   for metrics in (two[f"{kind}_ranks"], one[kind]))
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "bound"), [
    *((f"streamed_{stage}", 1e-6) for stage in "023"), ("streamed_packed", 1e-5),
    *((f"streamed_bf16_{stage}", 1e-6) for stage in "23"),
    *((f"{kind}_streamed", 1e-6) for kind in STREAMED_KINDS),
    *(pytest.param(name, 1e-6, marks=pytest.mark.all) for name in ("streamed_1", "streamed_bf16_1")),
])
def test_groups_that_are_trained_on_as_they_come_give_the_same_gradient(
    folder: Path, measured: dict, one: dict, name: str, bound: float,
) -> None:
    """In three parts against one rank with the whole batch (bf16: both ranks); and the same metrics."""
    whole = "one" if name.startswith("streamed") else name.removesuffix("_streamed")
    whole = "bf16_whole" if "bf16" in name else whole
    assert relative_gap(tensors(folder, name), tensors(folder, whole)) <= bound
    packing = {"train/num_micro_batches", "train/padding_frac"}
    got, wanted = ({k: v for k, v in metrics.items() if k not in packing}
                   for metrics in (measured[name], {**measured, **one}[whole]))
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


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


def test_the_gap_to_the_sampler_is_of_samples_of_the_present_steps_weights(one: dict) -> None:
    """Whatever version they were published as: a run that went back to a step has published it more than once."""
    again, of_another_step = one["published_again"]
    assert again == one["one"]
    gap = {name for name in again if name.startswith("weights/logprob_gap")}
    assert gap and not gap & of_another_step.keys()
    assert of_another_step == {name: value for name, value in again.items() if name not in gap}


@pytest.mark.parametrize("name", [*STAGES, "bf16"])
def test_resume_is_exact(folder: Path, measured: dict, name: str) -> None:
    reports = measured["resume_bf16"] if name == "bf16" else measured["resume"][name]
    assert reports["resumed"].pop("step") == 2
    assert reports["resumed"] == reports["went_on"]
    went_on, again = tensors_of(folder, f"went_on_{name}"), tensors_of(folder, f"resumed_{name}")
    assert all(torch.equal(again[k], went_on[k]) for k in went_on)


def tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load_torch

    return load_torch(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_written_beside_a_step_is_the_same_to_the_byte(folder: Path, measured: dict, name: str) -> None:
    """The step after it moves every weight meanwhile. Of one that can't be written the ranks say why, and go on."""
    before = {path.name: path.read_bytes() for path in (folder / f"checkpoint_{name}").iterdir()}
    assert before == {path.name: path.read_bytes() for path in (folder / f"beside_{name}").iterdir()}
    assert measured["resume"][name]["unwritten"] == "File exists"


def test_resume_with_another_world_size_and_stage(folder: Path, two: dict, one: dict) -> None:
    assert relative_gap(tensors(folder, "resumed_elsewhere"), tensors(folder, "went_on_3")) <= 1e-6
    went_on = two["resume"]["3"]["went_on"]
    assert one["resumed_elsewhere"]["actor/loss"] == pytest.approx(went_on["actor/loss"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_with_an_adapter_is_exact(folder: Path, measured: dict, stage: str) -> None:
    """Dropout included; its checkpoint holds the factors alone."""
    reports = measured["resume_lora"][stage]
    assert reports["resumed"].pop("step") == 2
    assert reports["resumed"] == reports["went_on"]
    went_on, again = tensors_of(folder, f"went_on_lora_{stage}"), tensors_of(folder, f"resumed_lora_{stage}")
    assert all(torch.equal(again[k], went_on[k]) for k in went_on)
    assert all("lora_" in name for name in load_file(folder / f"checkpoint_lora_{stage}" / "model.safetensors"))


def test_an_adapters_first_gradient_is_the_full_one_projected(folder: Path, one: dict) -> None:
    """B = 0: dL/dB = (alpha/rank)·(dL/dW)·Aᵀ and dL/dA = 0."""
    full, got, factors = (tensors(folder, name) for name in ("one", "lora_first", "factors_first"))
    wanted = {}
    for name, a_RI in factors.items():
        weight = name.partition(".lora_")[0] + ".weight"
        if ".lora_A." in name:
            wanted[name.replace("lora_A", "lora_B")] = (6.0 / 4 * full[weight].astype(np.float64) @ a_RI.T)
            assert not got[name].any()
    assert relative_gap({name: got[name] for name in wanted}, wanted) <= 1e-5


@pytest.mark.parametrize("name", [*STAGES, "checkpointing"])
def test_an_adapters_gradient_is_the_same_on_any_ranks_and_stage(
    folder: Path, measured: dict, one: dict, name: str,
) -> None:
    wanted = tensors(folder, "lora_one")
    assert relative_gap(tensors(folder, f"lora_{name}"), wanted) <= 1e-6
    assert any("lora_A" in key and value.any() for key, value in wanted.items())


def test_an_adapter_in_bf16(folder: Path, two: dict, one: dict) -> None:
    assert math.isfinite(two["lora_bf16"]["train/grad_norm"])
    assert relative_gap(tensors(folder, "lora_bf16"), tensors(folder, "lora_one")) < 0.1


def test_without_its_adapter_the_policy_is_the_reference(folder: Path, two: dict) -> None:
    """The log-probs of a reference actor; and the KL of the step, of which none were given, is to them."""
    samples = scoring_samples([rollout_group(uid) for uid in range(3)])
    reference = Reference(folder / "untied", dtype=torch.float32, device="cpu", temperature=0.7, chunk_tokens=16,
                          max_tokens_per_forward=64)
    (wanted,) = reference.forward([samples])
    got = tensors(folder, "reference_lora")
    assert max(float(np.abs(got[str(i)] - row).max()) for i, row in enumerate(wanted)) <= 1e-6
    assert two["lora_saved"]["actor/grpo_kl"] > 1e-3


def test_model_and_adapter_are_exported_alike(folder: Path, two: dict) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "untied")
    adapted = peft.PeftModel.from_pretrained(base, folder / "lora" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "lora" / "model").eval()
    ids = torch.arange(3, 40)[None]
    logits = adapted(input_ids=ids).logits
    assert (merged(input_ids=ids).logits - logits).abs().max() < 2e-5
    with adapted.disable_adapter():
        assert (adapted(input_ids=ids).logits - logits).abs().max() > 0.1


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
def test_bf16_keeps_fp32_master_weights(folder: Path, measured: dict, one: dict, stage: str) -> None:
    result = measured["bf16"][stage]
    assert result["types"] == ["torch.bfloat16"]
    assert result["fine"] > 0
    assert math.isfinite(result["metrics"]["train/grad_norm"])
    assert relative_gap(tensors(folder, f"bf16_{stage}"), tensors(folder, "one")) < 0.1
