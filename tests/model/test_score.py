"""Scores equal those of transformers' own sequence classification, values and gradients; saved, it opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from flux_ray.batch import make_micro_batch, without_weight
from flux_ray.errors import UserError
from flux_ray.model import ScoreModel, last_token, load_score, load_tokenizer, padding_token, save_model
from flux_ray.records import Sample
from tests.families import make_family
from tests.model.test_policy import ragged_samples
from tests.tiny import EOS_ID, PAD_ID, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit


def score_model(path: Path, *, layout: str = "padded") -> ScoreModel:
    """From a policy, with a head that isn't zero."""
    model = load_score(path, dtype=torch.float32, layout=layout)
    assert not model.head.weight.any()
    with torch.no_grad():
        model.head.weight.copy_(torch.linspace(-1, 1, model.head.weight.shape[1])[None])
    return model


def written(path: Path, folder: Path) -> Path:
    """The model of a policy's folder, saved as transformers finds it."""
    model = score_model(path)
    tokenizer = model.pad_alike(load_tokenizer(path))
    save_model(folder, ((n, p) for n, p in model.hf.named_parameters()), hf_config=model.original_config,
               tokenizer=tokenizer, generation_config=None)
    return folder


def at_the_end(samples: list[Sample]) -> list[Sample]:
    """Asked for at their last token alone, which is the end token."""
    result = []
    for sample in samples:
        ids = np.concatenate([sample.token_ids[:-1], [EOS_ID]]).astype(np.int32)
        mask = np.arange(len(ids)) == len(ids) - 1
        result.append(Sample(ids, mask, mask.astype(np.float32)))
    return result


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("policy"), tied=True)


@pytest.fixture(scope="module")
def scorer(policy, tmp_path_factory) -> Path:
    return written(policy, tmp_path_factory.mktemp("scorer") / "model")


@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_transformers(scorer, layout, side) -> None:
    """Padded at either side, which moves where a row's last token lies, its own positions and its sight."""
    samples = at_the_end(ragged_samples())
    tokenizer = AutoTokenizer.from_pretrained(scorer, padding_side=side)
    hf = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    assert hf.config.num_labels == 1 and hf.config.pad_token_id == tokenizer.pad_token_id == PAD_ID
    batch = tokenizer.pad({"input_ids": [s.token_ids.tolist() for s in samples]}, return_tensors="pt")
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = hf(**batch).logits[:, 0]

    model = load_score(scorer, dtype=torch.float32, layout=layout, new_head=False)
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    scores_S = model(micro_batch, at="last")
    assert scores_S.dtype == torch.float32 and not scores_S[~micro_batch.loss_mask_S].any()
    torch.testing.assert_close(scores_S[micro_batch.loss_mask_S], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
def test_values_and_gradients_before_each_loss_token(scorer, layout) -> None:
    samples = ragged_samples()
    hf = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    values = []
    for sample in samples:
        hidden_TH = hf.base_model(input_ids=torch.from_numpy(sample.token_ids).long()[None])[0][0]
        values.append(hf.score(hidden_TH)[:-1, 0][torch.from_numpy(sample.loss_mask)[1:]])
    wanted = torch.cat(values)
    model = load_score(scorer, dtype=torch.float32, layout=layout, new_head=False)
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    values_S = model(micro_batch, at="before")
    got = values_S[micro_batch.loss_mask_S]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for one, values_N in ((hf, wanted), (model.hf, got)):
        one.zero_grad()
        (values_N * torch.linspace(-1, 1, len(values_N))).sum().backward()
    for (name, mine), theirs in zip(model.hf.named_parameters(), hf.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_micro_batch_that_asks_for_nothing_still_runs_backward(scorer) -> None:
    model = load_score(scorer, dtype=torch.float32, layout="padded")
    model(without_weight(), at="before").sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_a_head_of_its_own_comes_back_and_a_body_is_taken_from_one(scorer, policy) -> None:
    first, second = load_score(scorer, dtype=torch.float32), score_model(policy)
    ours = dict(second.hf.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in first.hf.named_parameters())
    assert "score.weight" in ours and all(name.startswith(("model.", "score.")) for name in ours)


def test_in_bfloat16_values_are_fp32(scorer) -> None:
    model = load_score(scorer, dtype=torch.bfloat16, layout="padded")
    values_S = model(make_micro_batch(ragged_samples(), sample_ids=range(5)), at="before")
    assert values_S.dtype == torch.float32 and (values_S != values_S.bfloat16().float()).any()


def test_what_is_no_score_model_is_refused(policy, tmp_path) -> None:
    with pytest.raises(UserError, match="is no sequence classification model"):
        load_score(policy, dtype=torch.float32, new_head=False)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="don't come from one linear layer"):
        load_score(tmp_path / "bert", dtype=torch.float32)
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="has 3 labels"):
        load_score(tmp_path / "three", dtype=torch.float32)


def test_padding_is_no_token_that_ends_a_text() -> None:
    tokenizer = tiny_tokenizer()
    assert padding_token(tokenizer) == PAD_ID
    tokenizer.pad_token = tokenizer.eos_token
    assert padding_token(tokenizer) == tokenizer.unk_token_id
    assert last_token(np.array([5, 0, 7, 0]), 0) == 2 and last_token(np.array([5, 0]), None) == 1


def test_a_type_of_which_there_is_no_scoring_model_is_said_in_one_line(tmp_path):
    make_family("OLMoE", tmp_path)
    with pytest.raises(UserError, match=r"^model '.*': transformers has no SequenceClassification model of type "
                                        r"'olmoe'$"):
        load_score(tmp_path, dtype=torch.float32)
