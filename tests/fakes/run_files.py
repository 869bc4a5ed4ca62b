"""Files of a run with made contents, in the layout that runs write.

Takes:  a folder, how many steps, groups and samples.
Gives:  `write_run`: config.yaml, metrics.jsonl, eval.jsonl, rollouts/, traces/; its parts one by one.
Knows:  a rollout's reward is `sample / group size`, rising with the step: what a table must show is known beforehand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flux_ray.observability.rollouts import SCHEMA

FLOATS = pa.list_(pa.float32())

WORDS = ("the", "sum", "of", "seven", "and", "nine", "is", "sixteen", "so", "answer", "<b>bold</b>", "carry", "one")


def write_run(path: Path, *, steps: int = 4, groups: int = 2, group_size: int = 4, num_tokens: int = 12) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("algo:\n  name: grpo\nmodel:\n  path: /nowhere\nseed: 0\n", encoding="utf-8")
    write_metrics(path, steps)
    answers = [[{"prompt": f"{i}+{i}=", "completion": str(2 * i if late else i), "reward": float(late)}
                for i in range(1, 4)] for late in (False, True)]
    write_lines(path / "eval.jsonl", [{"step": 0, "eval/mean": 0.25, "answers": answers[0]},
                                      {"step": steps, "eval/mean": 0.75, "answers": answers[1]}])
    for step in range(steps):
        write_rollouts(path, step, groups=groups, group_size=group_size, num_tokens=num_tokens)
    write_trace(path, steps - 1)
    return path


def write_lines(file: Path, records: list[dict]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{json.dumps(record)}\n" for record in records)


def write_metrics(path: Path, steps: int, *, first: int = 0, gain: float = 0.9) -> None:
    shares = [step / max(1, steps - 1) for step in range(first, steps)]
    write_lines(path / "metrics.jsonl", [{
        "step": first + i, "reward/mean": gain * share, "reward/task_mean": gain * share,
        "actor/loss": 0.1 - share / 10, "actor/entropy": 3 - 2 * share, "actor/grpo_kl": None if i == 0 else share / 5,
        "rollout/response_length_mean": 100 + 50 * share, "rollout/tokens": 4096.0, "rollout/tokens_per_s": 800 + 9 * i,
        "driver/wait_s": 1.5, "train/step_s": 2.0, "weights/publish_s": 0.5, "driver/step_s": 4.0,
    } for i, share in enumerate(shares)])


def write_rollouts(path: Path, step: int, *, groups: int, group_size: int, num_tokens: int) -> None:
    """One file of the step: all groups are trained, but the last, whose rewards are the same."""
    rng = np.random.default_rng(step)
    rows = groups * group_size
    prompt_length, total = 4, 4 + num_tokens
    uids = np.repeat(np.arange(groups) + step * groups, group_size)
    samples = np.tile(np.arange(group_size), groups)
    dropped = (np.arange(rows) // group_size == groups - 1) & (groups > 1)
    rewards = np.where(dropped, 0.0, samples / group_size + step / 1000)
    words = rng.integers(0, len(WORDS), (rows, num_tokens))
    mask = np.tile(np.arange(total) >= prompt_length, (rows, 1))
    logprobs = np.where(mask, -rng.exponential(0.7, (rows, total)), 0.0).astype(np.float32)
    advantages = np.where(mask, (rewards - rewards.mean())[:, None], 0).astype(np.float32)
    nothing = pa.nulls(rows, FLOATS)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * total, pa.array(values.reshape(-1), kind))

    columns = {
        "uid": uids, "attempt": np.zeros(rows, int), "sample": samples, "row": uids % 50,
        "data_set": ["sums"] * rows, "prompt": [f"{uid}+{uid}=" for uid in uids],
        "response": [" ".join(WORDS[word] for word in line) for line in words],
        "token_ids": lists(rng.integers(0, 60, (rows, total)), pa.int32()),
        "prompt_length": [prompt_length] * rows, "loss_mask": lists(mask, pa.bool_()),
        "versions": lists(np.tile(np.where(np.arange(total) >= total // 2, step + 1, step), (rows, 1)), pa.int32()),
        "sampler_logprobs": lists(logprobs, pa.float32()),
        "old_logprobs": lists(logprobs + np.float32(0.01), pa.float32()),
        "policy_logprobs": lists(logprobs + np.float32(0.05), pa.float32()), "reference_logprobs": nothing,
        "advantages": lists(advantages, pa.float32()),
        "num_turns": [1] * rows, "finish_reason": ["stop"] * rows, "truncated": samples == group_size - 1,
        "num_tokens": [num_tokens] * rows, "reward": rewards, "task_reward": rewards,
        "advantage": rewards - rewards.mean(), "entropy": [0.5] * rows, "update": [0] * rows,
        "parts": [[{"key": "exact", "value": r}, {"key": "format", "value": 1.0}] for r in rewards.tolist()],
        "outcome": np.where(dropped, "same_reward", "trained").tolist(), "generate_s": rng.random(rows),
        "score_s": rng.random(rows) / 9, "reference_s": [None] * rows, "worker": [0] * rows, "engine": samples % 2,
    }
    folder = path / "rollouts" / f"step={step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type)
              for f in SCHEMA]
    pq.write_table(pa.table(arrays, schema=SCHEMA), folder / "000-0.parquet", compression="zstd")


def write_trace(path: Path, step: int) -> None:
    """Chrome's trace events: two actors, spans within spans."""
    spans = [(1, 1, "step", 0, 4_000_000), (1, 1, "wait for groups", 0, 1_500_000),
             (1, 1, "train", 1_500_000, 2_000_000), (1, 1, "publish", 3_500_000, 500_000),
             (2, 1, "generate", 0, 1_400_000), (2, 2, "generate", 100_000, 900_000)]
    events = [{"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": {"tokens": dur // 1000}}
              for pid, tid, name, ts, dur in spans]
    names = [{"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
             for pid, name in ((1, "driver"), (2, "engine 0"))]
    (path / "traces").mkdir(exist_ok=True)
    text = json.dumps({"traceEvents": names + events})
    (path / "traces" / f"step-{step:06d}.json").write_text(text, encoding="utf-8")
