import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.addition import SLIPS, TEACHER_SLIPS, make_addition

pytestmark = pytest.mark.unit


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_addition(tmp_path_factory.mktemp("toy"), seed=3)


def test_all_sums_are_there_once(toy):
    train, held_out = read(toy / "train.jsonl"), read(toy / "eval.jsonl")
    assert len(held_out) == 512 and len(train) + len(held_out) == 8100
    assert len({row["prompt"] for row in train + held_out}) == 8100
    for row in train + held_out:
        first, second = row["prompt"].removesuffix("=").split("+")
        assert int(first) + int(second) == int(row["answer"])


def test_the_teacher_slips_as_often_as_said_and_by_one_or_ten(toy):
    rows = read(toy / "train.jsonl") + read(toy / "eval.jsonl")
    slips = [int(row["completion"]) - int(row["answer"]) for row in rows]
    wrong = [slip for slip in slips if slip]
    assert len(wrong) / len(slips) == pytest.approx(TEACHER_SLIPS, abs=0.02)  # four standard errors of 8,100
    assert set(wrong) == set(SLIPS)


def test_pairs_prefer_the_right_sum_on_the_same_prompts(toy):
    for name, pairs in (("train", "pairs"), ("eval", "pairs_eval")):
        rows, preferred = read(toy / f"{name}.jsonl"), read(toy / f"{pairs}.jsonl")
        assert [(row["prompt"], row["answer"]) for row in rows] == [(row["prompt"], row["chosen"]) for row in preferred]
        assert all(int(row["chosen"]) != int(row["rejected"]) for row in preferred)


def test_the_tokenizer_comes_back_the_same(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    ids = tokenizer("12+30=")["input_ids"]
    assert len(ids) == 6 and tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12+30="
    assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_model_loads_and_knows_its_end(toy):
    model = AutoModelForCausalLM.from_pretrained(toy / "model")
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    assert 0.7e6 < model.num_parameters() < 0.9e6 and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert GenerationConfig.from_pretrained(toy / "model").eos_token_id == tokenizer.eos_token_id


def test_a_seed_makes_one_toy_and_the_callers_random_state_stays(toy, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = make_addition(tmp_path / "again", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    other = make_addition(tmp_path / "other", seed=4)
    for name in ("train.jsonl", "eval.jsonl", "pairs.jsonl", "model/model.safetensors"):
        assert (toy / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
