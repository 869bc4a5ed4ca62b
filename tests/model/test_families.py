"""Every family of models gives the trainer what its own file in transformers gives, or is refused from its config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PhiConfig

from flux_ray.batch import make_micro_batch
from flux_ray.errors import UserError
from flux_ray.model import load_policy, load_score, policy_traits, save_model, score_traits
from flux_ray.records import Sample
from flux_ray.train import full_weights
from tests.families import CONTEXT, EXPERTS_FAMILIES, FAMILIES, WINDOW, make_family
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
TEMPERATURE = 0.7
MAX_GAP = 1e-5  # of log-probs of down to -25, in float32
#: Those that compute what others don't; the rest only where all are asked for.
NOTABLE = ("Llama", "Gemma 2", "GPT-NeoX (Pythia)", "Bloom", "Cohere 2", "SmolLM 3", "LFM 2", "Phi", "Mixtral",
           "gpt-oss")
LENGTHS = (CONTEXT - 20, WINDOW + 1, 17)


def samples() -> list[Sample]:
    """Token sequences that leave the window, in rows of unequal length."""
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(3, 64, n).astype(np.int32), np.arange(n) >= 1, np.zeros(n, np.float32))
            for n in LENGTHS]


def by_eager(folder: Path) -> np.ndarray:
    """Log-probs of the samples' tokens, the first ones left out, by the model's own file."""
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rows = []
    for sample in samples():
        ids = torch.tensor(sample.token_ids, dtype=torch.long)
        with torch.no_grad():
            logprobs_TV = (hf(ids[None]).logits[0].float() / TEMPERATURE).log_softmax(-1)
        rows.append(logprobs_TV[:-1].gather(1, ids[1:, None])[:, 0])
    return torch.cat(rows).numpy()


def ours(folder: Path, **how: str) -> np.ndarray:
    policy = load_policy(folder, dtype=torch.float32, chunk_tokens=64, **how).eval()
    micro_batch = make_micro_batch(samples(), sample_ids=range(len(LENGTHS)))
    with torch.no_grad():
        logprobs_S, _ = policy(micro_batch, temperature=TEMPERATURE, with_entropy=False)
    return logprobs_S[micro_batch.loss_mask_S].numpy()


@pytest.mark.parametrize("name", [
    name if name in NOTABLE else pytest.param(name, marks=pytest.mark.all) for name in FAMILIES])
def test_the_trainer_computes_what_the_models_own_file_does(tmp_path: Path, name: str) -> None:
    folder = make_family(name, tmp_path)
    gaps = np.abs(ours(folder) - by_eager(folder))
    assert gaps.max() < MAX_GAP, f"from position {int(np.argmax(gaps > MAX_GAP))} on"


def test_what_an_attention_would_pass_over_is_refused_by_name(tmp_path: Path) -> None:
    """Gemma 2 caps its attention's scores, which torch's attention doesn't: auto takes the model's own file."""
    folder = make_family("Gemma 2", tmp_path)
    assert policy_traits(folder).asks == {"softcap"}
    for attention in ("sdpa", "causal_blocks"):
        with pytest.raises(UserError) as told:
            ours(folder, attention=attention)
        assert str(told.value) == (
            f"model.attention={attention}: model {str(folder)!r} has a cap on its attention's scores, which this "
            "attention passes over: leave model.attention at auto, or set it to eager")
        with pytest.raises(UserError, match="a cap on its attention's scores"):
            score_traits(folder, attention)
    np.testing.assert_allclose(ours(folder, attention="eager"), by_eager(folder), atol=MAX_GAP)
    assert load_policy(folder, dtype=torch.float32, chunk_tokens=8).hf.config._attn_implementation == "eager"


def test_a_model_that_lets_nobody_choose_its_attention(tmp_path: Path) -> None:
    folder = make_family("Bloom", tmp_path)
    with pytest.raises(UserError, match=r"model\.attention=sdpa: .* lets nobody choose its attention: leave "):
        ours(folder, attention="sdpa")


def test_a_policy_whose_tokens_see_those_after_them_is_refused(tmp_path: Path) -> None:
    """Gemma 3 as a text encoder has it: padding would be seen as well."""
    config = FAMILIES["Gemma 3"]()
    config.use_bidirectional_attention = True
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokens see those after them: only causal models are supported"):
        policy_traits(tmp_path)


def test_a_reward_model_scores_what_transformers_scores(tmp_path: Path) -> None:
    """Of a family whose attention caps its scores: at the last token of each text."""
    torch.manual_seed(0)
    config = FAMILIES["Gemma 2"]()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    made = samples()
    scorer = load_score(tmp_path, dtype=torch.float32, new_head=False).eval()
    micro_batch = make_micro_batch(made, sample_ids=range(len(made)))
    with torch.no_grad():
        got_S = scorer(micro_batch, at="last")
        wanted = [float(model(torch.tensor(s.token_ids[None], dtype=torch.long)).logits) for s in made]
    ends = micro_batch.lengths_B.cumsum(0) - 1
    np.testing.assert_allclose(got_S[ends].numpy(), wanted, atol=1e-5)


#: GPT-NeoX calls its head one thing when it trains and another in a checkpoint. Experts are trained as one tensor.
OTHERWISE_KEPT = ("GPT-NeoX (Pythia)", *EXPERTS_FAMILIES)


@pytest.mark.parametrize("name", OTHERWISE_KEPT)
def test_what_is_saved_is_what_was_read_bit_for_bit(tmp_path: Path, name: str) -> None:
    """A model that learned nothing is saved as it was, name by name, by as many buckets as there are."""
    folder = make_family(name, tmp_path / "start")
    policy = load_policy(folder, dtype=torch.float32, chunk_tokens=8)
    read, described = load_file(folder / "model.safetensors"), full_weights.metadata(policy)
    assert {name: shape for name, _, shape in described} == {name: tensor.shape for name, tensor in read.items()}
    given = full_weights.iter_weights(policy, 1000)
    for (name, _, shape), (as_given, tensor) in zip(described, given, strict=True):
        assert (as_given, tensor.shape) == (name, shape) and torch.equal(tensor, read[name]), name


@pytest.mark.parametrize("name", OTHERWISE_KEPT)
def test_a_saved_model_computes_what_was_trained(tmp_path: Path, name: str) -> None:
    folder = make_family(name, tmp_path / "start")
    policy = load_policy(folder, dtype=torch.float32, chunk_tokens=64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        trained_S, _ = policy(packed := make_micro_batch(samples(), sample_ids=range(len(LENGTHS))),
                              temperature=TEMPERATURE, with_entropy=False)
    save_model(tmp_path / "out", full_weights.iter_weights(policy, 1000), hf_config=policy.original_config,
               tokenizer=None, generation_config=None)
    assert np.abs(ours(tmp_path / "out") - ours(folder)).max() > 0.1
    np.testing.assert_array_equal(ours(tmp_path / "out"), trained_S[packed.loss_mask_S].numpy())


def test_a_head_that_is_no_scaled_or_capped_product_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As a model's own file might have it: logits squared."""
    PhiConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
              pad_token_id=0, bos_token_id=1, eos_token_id=1).save_pretrained(tmp_path)
    before = type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))).forward

    def forward(self, *args, **more):
        output = before(self, *args, **more)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr("transformers.PhiForCausalLM.forward", forward)
    with pytest.raises(UserError, match=r"not a scaled or capped lm_head\(hidden\) \(square"):
        policy_traits(tmp_path)


def test_the_head_is_known_where_zero_3_has_been(tmp_path, monkeypatch):
    """DeepSpeed puts several operations in the place of one, in the whole process and for good."""
    def in_several(given, weight, bias=None):
        output = given.matmul(weight.t()) if given.dim() > 2 else torch.mm(given, weight.t())
        return output if bias is None else output + bias

    tiny_model(tmp_path, tied=True)
    before = policy_traits(tmp_path)
    monkeypatch.setattr(torch.nn.functional, "linear", in_several)
    assert policy_traits(tmp_path) == before
