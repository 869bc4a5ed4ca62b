"""Two-digit addition, and a model small enough to learn it on a laptop in minutes.

Takes:  a folder to make, a seed.
Gives:  model/ (characters as tokens, random weights), train.jsonl, eval.jsonl (held out); pairs.jsonl and
        pairs_eval.jsonl: the same prompts with the right sum preferred to a wrong one.
Knows:  all 8,100 sums of two numbers from 10 to 99; `completion` is a fallible teacher's, `answer` the truth.
"""

from __future__ import annotations

import argparse
import random
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.tiny_model import SPECIAL_TOKENS, UNKNOWN, Sizes, save_model, write_jsonl

CHARACTERS = "0123456789+="
NUMBERS = range(10, 100)
#: 0.8M parameters: two wide layers learn the carry in fewer and cheaper steps than four narrow ones. Untied, with large
#: embeddings: with the usual small ones the first norm multiplies every error by fifty, rounding errors too.
SIZES = Sizes(
    hidden_size=256,
    num_hidden_layers=2,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    initializer_range=0.06,
)
EMBEDDING_RANGE = 0.5
#: The teacher whom the warm-up imitates slips in so many of his sums, by one or by ten: what GRPO has to unlearn from
#: right and wrong alone.
TEACHER_SLIPS = 0.45
SLIPS = (-10, -1, 1, 10)
NUM_EVAL = 512  # held-out prompts: a standard error of at most 2.2 points of accuracy


def make_addition(folder: str | Path, *, seed: int = 0, num_eval: int = NUM_EVAL, sizes: Sizes = SIZES) -> Path:
    """Make the toy in `folder` and return it: the same data and weights for a seed, no prompt in both files."""
    folder = Path(folder)
    pairs = list(product(NUMBERS, NUMBERS))
    random.Random(seed).shuffle(pairs)
    teacher = random.Random(seed + 1)
    rows = [{"prompt": f"{a}+{b}=", "completion": _taught(a + b, teacher), "answer": str(a + b)} for a, b in pairs]
    write_jsonl(folder / "eval.jsonl", rows[:num_eval])
    write_jsonl(folder / "train.jsonl", rows[num_eval:])
    critic = random.Random(seed + 2)
    preferred = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": _wrong(int(row["answer"]), critic)}
                 for row in rows]
    write_jsonl(folder / "pairs_eval.jsonl", preferred[:num_eval])
    write_jsonl(folder / "pairs.jsonl", preferred[num_eval:])
    tokenizer = character_tokenizer(CHARACTERS)
    save_model(tokenizer, folder / "model", sizes=sizes, seed=seed, embedding_range=EMBEDDING_RANGE)
    return folder


def _taught(total: int, teacher: random.Random) -> str:
    """What the teacher writes: mostly the sum."""
    return str(total + (teacher.choice(SLIPS) if teacher.random() < TEACHER_SLIPS else 0))


def _wrong(total: int, chance: random.Random) -> str:
    """A slip, or just as often any number of at most four digits, which a policy may write as well."""
    wrong = chance.choice([total + chance.choice(SLIPS), chance.randrange(10 ** chance.randrange(1, 5))])
    return str(wrong if wrong != total else total + 1)


def character_tokenizer(characters: str) -> Tokenizer:
    """One token a character, after the special tokens."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a toy: two-digit addition and a tiny model with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_addition(arguments.folder, seed=arguments.seed))


if __name__ == "__main__":
    main()
