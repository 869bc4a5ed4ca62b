"""Token ids: together with what came before, a text is exactly itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flux_ray.config import SFTConfig, from_dict
from flux_ray.data import PairSource, PromptSource, SftSource
from flux_ray.data.tokens import Tokens, adds_blank, encode_continuations, encode_starts, special_prefix
from flux_ray.errors import UserError
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit

WORDS = ["<unk>", "<s>", "</s>", "\u2581", "\n", *map(chr, range(33, 127))]


def blank_first(form: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's: a blank is a character of its own, and one is put before every text."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    merges = [("\u2581", "4"), ("\u2581", "A"), ("2", "+")]
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=False))
    if form == "normalizer":   # as Llama 2's
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("form", ["normalizer", "always", "first"])
@pytest.mark.parametrize(("prompt", "completion"), [
    ("Q: 2+2? A:", " 4"), ("Q: 2+2? A: ", "4"), ("2+2=", "4"), ("a\n", "A\n4"), ("a", "  4"), ("a", "\n"),
])
def test_prompt_and_completion_together_are_the_file_s_text(form, prompt, completion):
    tokenizer = blank_first(form)
    assert adds_blank(tokenizer)
    if completion.strip():
        rows = [{"prompt": prompt, "completion": completion}]
        (sample,) = SftSource.from_config(SFTConfig(), tokenizer, context_length=64, rows=rows).all()
        assert tokenizer.decode(sample.token_ids, skip_special_tokens=True) == prompt + completion
        assert sample.token_ids[0] == 1 and sample.token_ids[-1] == 2
    start, rest = encode_starts(tokenizer, [(prompt, False)]), encode_continuations(tokenizer, [completion])
    ids = np.concatenate([start[0], rest[0]])
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_a_tokenizer_that_adds_no_blank_encodes_a_text_as_it_is(plain_tokenizer):
    assert not adds_blank(plain_tokenizer)
    assert plain_tokenizer.decode(encode_continuations(plain_tokenizer, [" 4\n"])[0]) == " 4\n"


@pytest.mark.parametrize("text", ["Q: 4", "<s>Q: 4", "<s> Q: 4"])
def test_a_text_has_one_bos(text):
    (ids,) = encode_starts(blank_first("normalizer"), [(text, False)])
    assert (ids == 1).sum() == 1 and ids[0] == 1


def test_plain_text_to_learn_has_one_bos_and_it_is_not_learned():
    tokenizer = blank_first("first")
    for text in ("4 A", "<s>4 A"):
        (sample,) = SftSource.from_config(SFTConfig(), tokenizer, context_length=64, rows=[{"text": text}]).all()
        assert (sample.token_ids == 1).sum() == 1 and not sample.loss_mask[0] and sample.loss_mask[1:].all()


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "a<eos>" and special_prefix(tokenizer) == []
    assert tokenizer.decode(encode_starts(tokenizer, [("a", False)])[0]) == "a"


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_tokenizer_without_an_end_token_is_refused_in_one_line(plain_tokenizer, name):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.eos_token = None
    source = {"sft": SftSource, "dpo": PairSource}[name]
    rows = [{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}]
    with pytest.raises(UserError, match=r"has no end token.*eos_token in its tokenizer_config\.json") as error:
        source.from_config(from_dict({"algo.name": name}), tokenizer, context_length=64, rows=rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["prompts", "sft", "dpo"])
def test_a_token_without_a_row_in_the_model_s_embedding_is_refused_by_row(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path, tied=True))
    tokenizer.add_tokens(["<tool>"])
    config = from_dict({"model.path": str(tmp_path), "algo.name": {"prompts": "grpo"}.get(kind, kind),
                        **({"rollout.max_tokens": 8} if kind == "prompts" else {})})
    rows = [{"prompt": "ab", "completion": "b", "chosen": "b", "rejected": "c"},
            {"prompt": "a<tool>", "completion": "b", "chosen": "b", "rejected": "c"}]
    why = r"row 2 \(from 1\).*token '<tool>' has id 64, but the model's embedding has 64 rows \(the tokenizer has 65"
    if kind == "prompts":
        with pytest.raises(UserError, match=why):
            PromptSource.from_config(config, tokenizer, context_length=64, prompts=rows)
        skipping = from_dict({"model.path": str(tmp_path), "rollout.max_tokens": 8, "data.on_bad_row": "skip"})
        assert PromptSource.from_config(skipping, tokenizer, context_length=64, prompts=rows).num_skipped == 1
    else:
        with pytest.raises(UserError, match=why):
            {"sft": SftSource, "dpo": PairSource}[kind].from_config(config, tokenizer, context_length=64, rows=rows)


def test_tokens_of_many_texts_lie_in_one_array():
    tokens = Tokens.joined([Tokens.of([[5, 6], []]), Tokens.of([[7, 99, 100]])])
    assert [ids.tolist() for ids in tokens] == [[5, 6], [], [7, 99, 100]]
    assert tokens.flat.dtype == np.int32 and tokens.beyond(99) == [(2, 99)] and tokens.beyond(None) == []


def test_samples_are_the_same_in_chunks_of_any_size(plain_tokenizer, monkeypatch):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    whole = SftSource.from_config(SFTConfig(), plain_tokenizer, context_length=64, rows=rows).all()
    monkeypatch.setattr("flux_ray.data.tokens.CHUNK", 3)
    monkeypatch.setattr("flux_ray.data.examples.CHUNK", 7)
    parts = SftSource.from_config(SFTConfig(), plain_tokenizer, context_length=64, rows=rows).all()
    assert [s.token_ids.tolist() for s in whole] == [s.token_ids.tolist() for s in parts]
