"""DPO and a reward model on the published preference pairs: held-out accuracy before and after, over five folds.

python -m benchmarks.hh_rlhf [--data FILE.jsonl.gz] [--folds N] [--processes N] [options of training]

For each fold: a tokenizer and a small model are made from the other folds' transcripts alone, warmed up on their chosen
ones (sft), then trained on their pairs by dpo, and from the same warm start as a reward model: the training ranks' own
steps. Every held-out pair is judged before and after; the judgements of all folds are pooled.

Judges: `reward_model` by score; `dpo` by the implicit reward; `dpo_logprob` by log π of the response, which has an
opinion before training too. Before training a new head scores 0 and the implicit reward is 0: every pair is a tie, and
the test is the sign test of right against wrong. Where there is an opinion before, it is McNemar's exact test on the
pairs that changed sides. `shorter` always takes the shorter response: what length alone would give.
Prints a JSON line a fold and one for all; about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data" / "hh_rlhf" / "harmless-base.jsonl.gz"
CONTEXT = 2048  # tokens: the longest transcript has about 1,300
NUM_FOLDS = 5
JUDGES = ("reward_model", "dpo", "dpo_logprob", "shorter")


def folds_of(rows: Sequence[Mapping[str, Any]], num_folds: int) -> list[list[int]]:
    """Row numbers of each held-out fold. Rows of one conversation (the same first words) stay in one fold."""
    openings = sorted({row["chosen"].split("\n\nAssistant:")[0] for row in rows})
    fold_of = {opening: i % num_folds for i, opening in enumerate(openings)}
    return [[i for i, row in enumerate(rows) if fold_of[row["chosen"].split("\n\nAssistant:")[0]] == fold]
            for fold in range(num_folds)]


def make_model(rows: Sequence[Mapping[str, Any]], folder: Path, given: argparse.Namespace) -> None:
    from examples.gsm8k import byte_level_bpe
    from examples.tiny_model import Sizes, save_model

    tokenizer = byte_level_bpe([row[side] for row in rows for side in ("chosen", "rejected")], given.vocab)
    sizes = Sizes(hidden_size=given.hidden, num_hidden_layers=given.layers, intermediate_size=3 * given.hidden,
                  num_attention_heads=given.hidden // 32, num_key_value_heads=given.hidden // 32, head_dim=32,
                  max_position_embeddings=CONTEXT)
    save_model(tokenizer, folder, sizes=sizes, seed=0)


def run_fold(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Judgements of the held-out pairs, +1 right, 0 a tie, -1 wrong, by judge and time."""
    from flux_ray.data.sources import load_rows

    rows = list(load_rows(given.data, split="train", max_rows=None).rows)
    held_out = set(folds_of(rows, given.folds)[given.fold])
    sides = {"train": [r for i, r in enumerate(rows) if i not in held_out],
             "test": [r for i, r in enumerate(rows) if i in held_out]}
    for name, part in sides.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = [{"text": row["chosen"]} for row in sides["train"]]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    make_model(sides["train"], folder / "start", given)
    warm_up(given, folder)
    return {**judge(given, folder, "dpo"), **judge(given, folder, "reward_model")}


def trainer_of(folder: Path, algorithm: str, **options: Any) -> Any:
    from flux_ray import FluxConfig
    from flux_ray.train import Trainer

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = FluxConfig(algorithm=algorithm, **{
        "data.train": str(folder / "train.jsonl"), "eval.data": str(folder / "test.jsonl"), "train.schedule": "linear",
        "train.warmup_steps": 5, "batch.max_tokens_per_micro_batch": 4096, **options})
    return Trainer(config, rank=0, world_size=1, master_address="127.0.0.1", master_port=port, device="cpu")


def warm_up(given: argparse.Namespace, folder: Path) -> None:
    """Next-token prediction on the chosen transcripts."""
    from flux_ray.data import SftSource
    from flux_ray.model import load_tokenizer

    size, num_rows = 16, len((folder / "texts.jsonl").read_text().splitlines())
    steps = max(1, round(given.sft_epochs * num_rows / size))
    trainer = trainer_of(folder, "sft", **{
        "model.path": str(folder / "start"), "data.train": str(folder / "texts.jsonl"),
        "train.learning_rate": given.sft_rate, "driver.num_steps": steps})
    source = SftSource.from_config(trainer.config, load_tokenizer(folder / "start"), context_length=CONTEXT)
    for step in range(steps):
        trainer.sft_step(source.batch(step, size))
    trainer.save_model(folder / "warm")


def judge(given: argparse.Namespace, folder: Path, algorithm: str) -> dict[str, Any]:
    """Train on the pairs and judge those held out, before and after."""
    from flux_ray.data import PairSource
    from flux_ray.model import load_tokenizer

    of_dpo, size = algorithm == "dpo", 16
    epochs, rate = (given.dpo_epochs, given.dpo_rate) if of_dpo else (given.rm_epochs, given.rm_rate)
    num_rows = len((folder / "train.jsonl").read_text().splitlines())
    steps = max(1, round(epochs * num_rows / size))
    trainer = trainer_of(folder, algorithm, **{
        "model.path": str(folder / "warm"), "train.learning_rate": rate, "driver.num_steps": steps,
        "train.weight_decay": given.weight_decay, **({"algo.beta": given.beta} if of_dpo else {})})
    tokenizer = load_tokenizer(folder / "warm")
    pairs = PairSource.from_config(trainer.config, tokenizer, context_length=CONTEXT)
    test = PairSource.for_eval(trainer.config, tokenizer, context_length=CONTEXT).all()
    reference = {id(pair): sums for pair, sums in zip(
        pairs.all(), log_probs(trainer, pairs.all()), strict=True)} if of_dpo else {}
    before = [(0.0, 0.0)] * len(test)
    result: dict[str, Any] = {"shorter": {"after": [len(p.rejected_ids) - len(p.chosen_ids) for p in test]}}
    if of_dpo:
        before = log_probs(trainer, test)
        result["dpo_logprob"] = {"before": [w - l for w, l in before]}
    for step in range(steps):
        batch = pairs.batch(step, size)
        trainer.pair_step(pairs=batch, reference_logprobs=[reference[id(p)] for p in batch] if of_dpo else None)
    if of_dpo:
        after = log_probs(trainer, test)
        result["dpo_logprob"]["after"] = [w - l for w, l in after]
        result["dpo"] = {"after": [(w - bw) - (l - bl) for (w, l), (bw, bl) in zip(after, before, strict=True)]}
    else:
        result["reward_model"] = {"after": [
            trainer.pair_metrics(pairs=[p], reference_logprobs=None)["pairs/margin"] for p in test]}
    train_part = pairs.all()[:200]
    sums = [reference[id(p)] for p in train_part] if of_dpo else None
    on_train = trainer.pair_metrics(pairs=train_part, reference_logprobs=sums)["pairs/accuracy"]
    signs = {name: {when: [(m > 0) - (m < 0) for m in margins] for when, margins in of_one.items()}
             for name, of_one in result.items()}
    return {**signs, f"{algorithm}_on_train": on_train}


def log_probs(trainer: Any, pairs: list[Any]) -> list[tuple[float, float]]:
    """log π of both responses of each pair, as a reference of the same weights would give them."""
    from flux_ray.batch import pair_samples
    from flux_ray.model.scoring import response_sums
    from flux_ray.train.policy_step import logprobs

    sums = response_sums(logprobs(trainer.engine, trainer.config, pair_samples(pairs), temperature=1.0))
    return list(zip(sums[::2], sums[1::2], strict=True))


# -- the tests -------------------------------------------------------------------------------------------------------

def sign_test(num_right: int, num_wrong: int) -> float:
    """Two-sided exact probability of a split at least so uneven, if right and wrong were equally likely."""
    n, k = num_right + num_wrong, max(num_right, num_wrong)
    tail = sum(math.comb(n, i) for i in range(k, n + 1))
    return min(1.0, 2 * tail / 2**n)


def accuracy(signs: list[int]) -> float:
    """A tie counts one half."""
    return sum((sign + 1) / 2 for sign in signs) / len(signs)


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies over all folds' held-out pairs, and the exact test of each judge against where it began."""
    def signs(name: str, when: str) -> list[int]:
        return [sign for part in parts for sign in part[name].get(when, [0] * len(part[name]["after"]))]

    result: dict[str, Any] = {"pairs": len(signs("shorter", "after"))}
    for name in JUDGES:
        before, after = signs(name, "before"), signs(name, "after")
        # An opinion changed for the better, or for the worse: McNemar's discordant pairs. From ties: right and wrong.
        better = sum(a > b for a, b in zip(after, before, strict=True))
        worse = sum(a < b for a, b in zip(after, before, strict=True))
        result[name] = {"before": round(accuracy(before), 4), "after": round(accuracy(after), 4), "better": better,
                        "worse": worse, "p": float(f"{sign_test(better, worse):.3g}"),
                        "folds": [round(accuracy(part[name]["after"]), 3) for part in parts]}
    for name in ("reward_model", "dpo"):
        against = list(zip(signs(name, "after"), signs("shorter", "after"), strict=True))
        better, worse = sum(a > b for a, b in against), sum(a < b for a, b in against)
        result[f"{name}_against_shorter"] = {"better": better, "worse": worse,
                                             "p": float(f"{sign_test(better, worse):.3g}")}
        result[f"{name}_on_train"] = round(sum(part[f"{name}_on_train"] for part in parts) / len(parts), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--folds", type=int, default=NUM_FOLDS)
    parser.add_argument("--only", type=int, default=None, help="run the first N folds alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fold", type=int, help=argparse.SUPPRESS)
    for name, default in {"vocab": 2048, "hidden": 128, "layers": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in {"sft-epochs": 2.0, "sft-rate": 2e-3, "dpo-epochs": 2.0, "dpo-rate": 2e-4, "beta": 0.1,
                          "rm-epochs": 2.0, "rm-rate": 3e-4, "weight-decay": 0.1}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    given = parser.parse_args()
    if given.fold is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_fold(given, Path(folder))))
        return
    if not Path(given.data).is_file():
        parser.exit(0, f"{given.data} isn't here: nothing to do\n")
    start_s = time.monotonic()
    waiting = list(range(given.only or given.folds))
    running: list[tuple[int, subprocess.Popen[str]]] = []
    parts: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < given.processes:
            fold = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.hh_rlhf", *sys.argv[1:], "--fold", str(fold)]
            running.append((fold, subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                                   env={**os.environ, "OMP_NUM_THREADS": "1"})))
        fold, process = running.pop(0)
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"fold {fold} failed")
        part = json.loads(output.splitlines()[-1])
        parts.append(part)
        print(json.dumps({"fold": fold, **pooled([part])}), flush=True)
    print(json.dumps({"folds": len(parts), **pooled(parts), "s": round(time.monotonic() - start_s)}))


if __name__ == "__main__":
    main()
