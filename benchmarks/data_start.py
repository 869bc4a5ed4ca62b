"""What the data of a run cost at its start: time and memory of reading and encoding its prompts.

Takes:  a number of rows; a file of GSM8K's form, whose problems are repeated under running numbers.
Gives:  one line of JSON: seconds, of all threads too, rows a second, peak resident memory of the process before and
        after, bytes a row.
Knows:  a tokenizer's threads (RAYON_NUM_THREADS) and a byte-level BPE of 16,000 tokens trained on the file.
Never:  starts a model, Ray or an engine: this is what `PromptSource` does before anything starts.

    python -m benchmarks.data_start --rows 1000000 GSM8K/train.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB_SIZE = 16_000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_rows(source: Path, file: Path, num_rows: int) -> list[str]:
    """Write the rows; the problems' texts, to train a tokenizer on."""
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with file.open("w", encoding="utf-8") as out:
        for number in range(num_rows):
            row = problems[number % len(problems)]
            made = {"question": f"Problem {number}. {row['question']}", "answer": row["answer"].rpartition("#### ")[2]}
            out.write(json.dumps(made) + "\n")
    return [row["question"] for row in problems]


def tokenizer_of(texts: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    from examples.gsm8k import byte_level_bpe

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, VOCAB_SIZE), eos_token="<eos>", pad_token="<pad>",
        chat_template=CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a run's data at its start.")
    parser.add_argument("source", type=Path, help="a file with question and answer, e.g. GSM8K's train.jsonl")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--chat", action="store_true", help="data.as_chat=true: each prompt goes through a template")
    given = parser.parse_args()

    from flux_ray.config import PolicyGradientConfig, from_dict
    from flux_ray.data import PromptSource

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        tokenizer = tokenizer_of(make_rows(given.source, file, given.rows))
        config = from_dict({"data.train": str(file), "data.prompt_column": "question", "data.as_chat": given.chat})
        assert isinstance(config, PolicyGradientConfig)
        before, start_s, start_cpu_s = peak_mib(), time.perf_counter(), time.process_time()
        prompts = PromptSource.from_config(config, tokenizer, context_length=4096)
        took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    tokens = sum(len(prompts.prompt(uid).token_ids) for uid in range(1000)) / 1000
    print(json.dumps({
        "rows": prompts.num_rows, "chat": given.chat, "tokens_mean": round(tokens, 1),
        "seconds": round(took_s, 1), "cpu_s": round(cpu_s, 1),
        "rows_per_s": round(prompts.num_rows / took_s), "peak_mib_before": round(before), "peak_mib": round(peak_mib()),
        "bytes_per_row": round((peak_mib() - before) * 2**20 / prompts.num_rows)}))


if __name__ == "__main__":
    main()
