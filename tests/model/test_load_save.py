"""Opening and saving models: what can't be trusted is refused in one line, what is saved loads elsewhere as it is."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    GPT2Config,
    GraniteConfig,
    HrmTextConfig,
    Lfm2Config,
)

from flux_ray.errors import UserError
from flux_ray.model import load, load_policy, load_tokenizer, resolve_dtype, save, save_model, slow_dtype
from tests.model.test_policy import ragged_samples
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", ["./no/such/folder", "/nowhere/model", "~/nowhere/model"])
def test_a_missing_folder_is_one_line(path: str) -> None:
    for opener in (lambda: load_policy(path, dtype=torch.float32, chunk_tokens=8), lambda: load_tokenizer(path)):
        with pytest.raises(UserError) as error:
            opener()
        assert path in one_line(error) and "no such folder" in one_line(error)


def test_a_folder_without_a_model(tmp_path) -> None:
    with pytest.raises(UserError) as error:
        load_policy(tmp_path, dtype=torch.float32, chunk_tokens=8)
    assert "no config.json" in one_line(error)


def test_the_folder_of_an_adapter_is_told_with_what_to_do(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(UserError) as error:
        load_policy(tmp_path, dtype=torch.float32, chunk_tokens=8)
    assert "holds an adapter of 'some/base', not a model: merge the two" in one_line(error)
    assert f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}).merge_and_unload()" in one_line(error)


def test_a_hub_name_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load_policy("nobody/nothing-of-that-name", dtype=torch.float32, chunk_tokens=8)
    assert "nobody/nothing-of-that-name" in one_line(error) and "neither a local folder" in one_line(error)


def test_missing_weights_are_refused(tmp_path) -> None:
    path = tiny_model(tmp_path, tied=False)
    weights = load_file(path / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_policy(path, dtype=torch.float32, chunk_tokens=8)
    assert "lm_head.weight" in one_line(error)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value: float) -> None:
    path = tiny_model(tmp_path, tied=True)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 1] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_policy(path, dtype=torch.float32, chunk_tokens=8)
    assert "its weight model.layers.0.mlp.up_proj.weight has values that are not finite" in one_line(error)
    with pytest.raises(UserError, match="not finite"):
        load.load_score(path, dtype=torch.float32)


def test_a_model_whose_checkpoint_keeps_several_weights_as_one_is_refused(tmp_path) -> None:
    """What is trained can't be given part by part where a checkpoint's tensor is made of several."""
    HrmTextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path, dtype=torch.float32, chunk_tokens=8)
    assert "its checkpoint keeps model.H_module.layers.0.mlp.gate_up_proj.weight otherwise than it" in one_line(error)


@pytest.mark.parametrize("layout", ["auto", "padded", "block_diagonal"])
def test_a_model_whose_layers_carry_state_over_the_border_of_a_sequence(tmp_path, monkeypatch, layout: str) -> None:
    """LFM2's convolutions: padded is exact, one row for all sequences isn't, and is refused (auto: not chosen)."""
    AutoModelForCausalLM.from_config(Lfm2Config(**SIZES, full_attn_idxs=[1])).save_pretrained(tmp_path)
    if layout == "auto":
        monkeypatch.setattr(load, "resolve_layout", lambda layout, attention, dtype: (
            "varlen" if layout == "auto" else layout, "sdpa"))
    if layout == "block_diagonal":
        with pytest.raises(UserError, match=r"block_diagonal: lfm2 has layers that carry .*: leave model\.layout"):
            load_policy(tmp_path, dtype=torch.float32, layout=layout, chunk_tokens=8)
    else:
        assert load_policy(tmp_path, dtype=torch.float32, layout=layout, chunk_tokens=8).layout == "padded"


@pytest.mark.parametrize("config", [
    Cohere2Config(**SIZES, logit_scale=0.25),
    GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0),
    GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, embd_pdrop=0.3, attn_pdrop=0.3),
])
@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
def test_other_architectures_are_exact(tmp_path, config, layout: str) -> None:
    from flux_ray.batch import make_micro_batch
    from tests.model.test_policy import by_transformers

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(3)
    hf.eval().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32, layout=layout, chunk_tokens=8)
    policy.train()  # dropout is off all the same
    samples = ragged_samples()
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    logprobs_S, entropy_S = policy(micro_batch, temperature=0.7, with_entropy=True)
    wanted_logprobs, wanted_entropy = by_transformers(hf, samples)
    torch.testing.assert_close(logprobs_S[micro_batch.loss_mask_S], wanted_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_S[micro_batch.loss_mask_S], wanted_entropy, atol=1e-5, rtol=0)


def test_varlen_without_flash_attention_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU may have flash attention")
    with pytest.raises(UserError) as error:
        load_policy("anything", dtype=torch.float32, layout="varlen", chunk_tokens=8)
    assert "model.layout=varlen" in one_line(error)


def test_dtypes() -> None:
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda:0") == torch.bfloat16
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16


@pytest.mark.parametrize(("machine", "has", "name", "device", "is_slow"), [
    ("x86_64", "AVX2", "bfloat16", "cpu", True), ("x86_64", "AVX512", "bfloat16", "cpu", False),
    ("x86_64", "AVX2", "auto", "cpu", False), ("x86_64", "AVX2", "bfloat16", "cuda", False),
    ("aarch64", "DEFAULT", "bfloat16", "cpu", False),
])
def test_a_type_that_the_processor_emulates_is_told(monkeypatch, machine, has, name, device, is_slow) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
    said = slow_dtype(name, device)
    assert ("model.dtype=float32" in said) if is_slow else (said is None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [2**32, 20_000])
def test_a_saved_model_loads_as_it_is(tmp_path, monkeypatch, tied: bool, max_shard_bytes: int) -> None:
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", max_shard_bytes)
    path = tiny_model(tmp_path / "start", tied=tied)
    policy = load_policy(path, dtype=torch.float32, chunk_tokens=8)
    out = tmp_path / "out"
    for _ in range(2):  # the second time there is a model to replace
        save_model(out, ((n, p) for n, p in policy.hf.named_parameters()), hf_config=policy.original_config,
                   tokenizer=load_tokenizer(path), generation_config=policy.hf.generation_config)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes < 2**32)
    a, b = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (path, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert AutoConfig.from_pretrained(out).architectures == ["Qwen3ForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert load_tokenizer(out)("12+3").input_ids == [4, 5, 13, 6]


def test_a_write_that_fails_leaves_what_was_there(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), save.atomic_folder(folder) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_keeps_the_folder_all_the_same(tmp_path, monkeypatch, answer) -> None:
    """Some network file systems do; files are synced there. Any other answer is a fault."""
    synced, answers, fsync = [], [answer], os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answers[0], os.strerror(answers[0]))
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with save.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "new" and len(synced) == 1
    answers[0] = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), save.atomic_folder(tmp_path / "other") as temporary:
        (temporary / "weights").write_text("new")
