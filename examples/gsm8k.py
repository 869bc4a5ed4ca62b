"""Word problems in words, and a model small enough to learn their form on a laptop.

Takes:  a file of GSM8K's form (`question`, `answer` with the result after `####`), a folder to make, a seed.
Gives:  model/ (byte-level BPE trained on the file, random weights), train.jsonl, eval.jsonl (held out).
Knows:  a small model learns the form of an answer long before it learns to calculate; short rows keep rollouts cheap.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.tiny_model import SPECIAL_TOKENS, Sizes, save_model, write_jsonl
from flux_ray.data.rows import Rows
from flux_ray.data.sources import load_rows
from flux_ray.errors import UserError

CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's notes for a calculator, of no use to a reader
RESULT_MARK = "####"

#: 3.7M parameters with a vocabulary of 2,000.
SIZES = Sizes(
    hidden_size=256,
    num_hidden_layers=4,
    intermediate_size=768,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
)
VOCAB_SIZE = 2000
MAX_PROMPT_TOKENS = 96
MAX_COMPLETION_TOKENS = 96  # the end token not counted
NUM_EVAL = 512


def make_gsm8k(
    source: str | Path,
    folder: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    num_eval: int = NUM_EVAL,
    sizes: Sizes = SIZES,
) -> Path:
    """Make the toy in `folder` and return it. Rows longer than the limits above are left out.

    UserError: no such file, a column is missing, an answer has no result, or nothing short enough is left to train on.
    """
    folder = Path(folder)
    rows = word_problems(load_rows(source, split="train", max_rows=None))
    tokenizer = byte_level_bpe([row["prompt"] + row["completion"] for row in rows], vocab_size)
    short = [row for row in rows if _is_short(row, tokenizer)]
    if len(short) <= num_eval:
        raise UserError(
            f"{source}: {len(short)} of {len(rows)} problems have at most {MAX_PROMPT_TOKENS}+{MAX_COMPLETION_TOKENS} "
            f"tokens, too few to hold {num_eval} out"
        )
    random.Random(seed).shuffle(short)
    write_jsonl(folder / "eval.jsonl", short[:num_eval])
    write_jsonl(folder / "train.jsonl", short[num_eval:])
    save_model(tokenizer, folder / "model", sizes=sizes, seed=seed)
    return folder


def word_problems(rows: Rows) -> list[dict[str, str]]:
    """Prompt, completion (the worked solution, its result on the last line) and answer of each row.

    >>> rows = Rows.from_dicts("it", [{"question": "1 and 1?", "answer": "1+1 = <<1+1=2>>2\\n#### 2"}])
    >>> word_problems(rows)
    [{'prompt': 'Question: 1 and 1?\\nAnswer:', 'completion': ' 1+1 = 2\\n#### 2', 'answer': '2'}]
    """
    for column in ("question", "answer"):
        rows.require(column, "GSM8K's form")
    problems = []
    for number, row in enumerate(rows.rows, start=1):
        solution = CALCULATION.sub("", str(row["answer"])).strip()
        _, mark, result = solution.rpartition(RESULT_MARK)
        if not mark or not result.strip():
            raise UserError(f"{rows.source} row {number} (from 1): column 'answer': no result after {RESULT_MARK}")
        prompt = f"Question: {str(row['question']).strip()}\nAnswer:"
        problems.append({"prompt": prompt, "completion": f" {solution}", "answer": result.strip()})
    return problems


def byte_level_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the texts; each digit is a token, so that numbers look alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _is_short(row: dict[str, str], tokenizer: Tokenizer) -> bool:
    prompt, completion = (len(tokenizer.encode(row[name]).ids) for name in ("prompt", "completion"))
    return prompt <= MAX_PROMPT_TOKENS and completion <= MAX_COMPLETION_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a toy of GSM8K's word problems, with a small model.")
    parser.add_argument("source", help="a file with question and answer, e.g. GSM8K's train.jsonl")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(make_gsm8k(arguments.source, arguments.folder, seed=arguments.seed))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
