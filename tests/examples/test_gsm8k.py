import doctest
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import gsm8k
from examples.gsm8k import MAX_COMPLETION_TOKENS, MAX_PROMPT_TOKENS, make_gsm8k, word_problems
from examples.tiny_model import Sizes
from flux_ray.data.rows import Rows
from flux_ray.errors import UserError
from flux_ray.reward.rules import numeric, regex

pytestmark = pytest.mark.unit

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TINY = Sizes(
    hidden_size=32,
    num_hidden_layers=1,
    intermediate_size=32,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def made_source(folder, num_rows=20):
    rows = []
    for n in range(num_rows):
        answer = f"{n}+2 = <<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"
        rows.append({"question": f"Ann has {n} pears and gets 2 more. How many?", "answer": answer})
    rows.append({"question": "long? " * 200, "answer": "#### 1"})
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(toy, num_eval):
    """What must hold of any source: rows are short, rewarded as they stand, and come back from their tokens."""
    train, held_out = read(toy / "train.jsonl"), read(toy / "eval.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    assert len(held_out) == num_eval and not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    rows = (train + held_out)[:300]
    assert not any("<<" in row["completion"] for row in rows)
    assert all(regex(None, [row["completion"] for row in rows]))
    assert all(numeric(None, [row["completion"] for row in rows], [row["answer"] for row in rows]))
    for row in rows:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        assert len(prompt) <= MAX_PROMPT_TOKENS and len(completion) <= MAX_COMPLETION_TOKENS
        assert tokenizer.decode(prompt + completion) == row["prompt"] + row["completion"]
    assert AutoModelForCausalLM.from_pretrained(toy / "model").config.vocab_size == len(tokenizer)
    return train, tokenizer


def test_a_small_source(tmp_path):
    toy = make_gsm8k(made_source(tmp_path), tmp_path / "toy", vocab_size=300, num_eval=5, sizes=TINY)
    train, tokenizer = check(toy, 5)
    assert len(train) == 15  # the long one is left out
    assert tokenizer.decode(tokenizer("naïve 12 ✓")["input_ids"]) == "naïve 12 ✓"


def test_the_real_source(tmp_path):
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join(GSM8K.read_text().splitlines()[:1500]))
    train, tokenizer = check(make_gsm8k(some, tmp_path / "toy", num_eval=100, sizes=TINY), 100)
    assert len(train) > 400 and len(tokenizer) == 2000


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(gsm8k) == (0, 2)


def test_problems_without_a_result_or_a_column_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"row 1 \(from 1\): column 'answer': no result after ####"):
        word_problems(Rows.from_dicts("it", [{"question": "q", "answer": "4"}]))
    with pytest.raises(UserError, match="unknown column 'question'"):
        word_problems(Rows.from_dicts("it", [{"prompt": "q", "answer": "#### 4"}]))
    with pytest.raises(UserError, match="no such file"):
        make_gsm8k(tmp_path / "gone.jsonl", tmp_path / "toy")
    with pytest.raises(UserError, match=r"20 of 21 problems have at most .* too few to hold 512 out"):
        make_gsm8k(made_source(tmp_path), tmp_path / "toy", vocab_size=300)
