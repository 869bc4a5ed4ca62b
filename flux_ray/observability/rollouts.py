"""The rollouts of a run on disk: RUN/rollouts/step=000041/WORKER-N.parquet, a row a sample.

Takes:  groups with what was made of them.
Gives:  `SCHEMA`; `write`; `steps`, `read`, `groups_of`; `KeptRollouts`, their bound in bytes; `cut`.
Knows:  `step` is that of metrics.jsonl, and is in the folder's name alone. A file comes into being whole: it is written
        under a hidden name, which readers pass over, and renamed. Old steps are thinned first.
Never:  loads a step that nobody asked for.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flux_ray.errors import UserError
from flux_ray.messages import GroupAt, TrainedTokens
from flux_ray.records import FINISH_LENGTH, Prompt, RolloutGroup, ScoredGroup, Trajectory

if TYPE_CHECKING:
    from pyarrow import Table

FOLDER = "rollouts"
TRAINED = "trained"  # the outcome of a group that a step took; of any other it is why it was dropped
GIB = 2**30
GROUPS_A_FILE = 64  # a worker's step is written in several files, so that it is never in memory twice
#: Of a reward, by its name. No map: `datasets` reads none.
PART = pa.struct([("key", pa.string()), ("value", pa.float64())])
_FLOATS = pa.list_(pa.float32())

#: Lists are over the T tokens of prompt and response; null where a value isn't known.
SCHEMA = pa.schema([
    ("uid", pa.int64()), ("attempt", pa.int32()), ("sample", pa.int32()), ("row", pa.int64()),
    ("data_set", pa.string()), ("prompt", pa.string()), ("response", pa.string()),
    ("token_ids", pa.list_(pa.int32())), ("prompt_length", pa.int32()), ("loss_mask", pa.list_(pa.bool_())),
    ("versions", pa.list_(pa.int32())),
    ("sampler_logprobs", _FLOATS), ("old_logprobs", _FLOATS), ("policy_logprobs", _FLOATS),
    ("reference_logprobs", _FLOATS), ("advantages", _FLOATS),
    ("num_turns", pa.int32()), ("finish_reason", pa.string()), ("truncated", pa.bool_()), ("num_tokens", pa.int32()),
    ("reward", pa.float64()), ("task_reward", pa.float64()), ("advantage", pa.float64()),
    ("entropy", pa.float64()),
    ("parts", pa.list_(PART)), ("outcome", pa.string()),
    ("generate_s", pa.float64()), ("score_s", pa.float64()), ("reference_s", pa.float64()),
    ("worker", pa.int32()), ("engine", pa.int32()), ("update", pa.int32()),
])
#: Columns that are a group's.
OWN = ("attempt", "outcome", "generate_s", "score_s", "reference_s", "worker", "update")
#: What a step made of a token: columns that are null in the rows of dropped groups.
MADE = ("advantages", "policy_logprobs", "old_logprobs", "reference_logprobs")


@dataclass(frozen=True)
class Rollout:
    """A group with all that is known of it. Lists have a (T,) float32 for each of its samples."""

    group: RolloutGroup
    attempt: int
    texts: Sequence[str]
    scored: ScoredGroup | None  # None: it wasn't scored
    outcome: str
    worker: int
    engines: Sequence[int]  # of each sample
    generate_s: float
    score_s: float
    reference_s: float
    update: int | None = None  # which of the step's updates in a pass took it
    made: Mapping[str, list[np.ndarray] | None] | None = None  # by the names MADE, and entropies


def is_kept(uid: int, share: float) -> bool:
    """Whether a prompt's groups belong to the share that is kept: always the same, on every machine."""
    return (uid * 2654435761) % 2**32 < share * 2**32  # Knuth's multiplicative hash spreads neighbours evenly


def step_folder(run: str | Path, step: int) -> Path:
    return Path(run, FOLDER, f"step={step:06d}")


def write(run: str | Path, step: int, rollouts: Sequence[Rollout]) -> int:
    """A worker's groups of a step; gives the bytes on disk. Raises OSError, and leaves no half of a file."""
    import pyarrow.parquet as pq

    num_bytes, folder = 0, step_folder(run, step)
    for number, first in enumerate(range(0, len(rollouts), GROUPS_A_FILE)):
        several = rollouts[first : first + GROUPS_A_FILE]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{several[0].worker:03d}-{number}.parquet"
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            pq.write_table(table_of(several), temporary, compression="zstd")
            num_bytes += temporary.stat().st_size
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return num_bytes


def table_of(rollouts: Sequence[Rollout]) -> Table:
    """A row a sample, in the order of groups and samples."""
    rows = [(rollout, i, t) for rollout in rollouts for i, t in enumerate(rollout.group.trajectories)]

    def each(get: Callable[[Rollout, int, Trajectory], object]) -> list[object]:
        return [get(*row) for row in rows]

    def own(name: str) -> list[object]:
        return [getattr(rollout, name) for rollout, _, _ in rows]

    def made(name: str) -> list[np.ndarray | None]:
        return [_of_sample(rollout, name, i) for rollout, i, _ in rows]

    def scores(name: str) -> list[object]:
        return each(lambda r, i, t: None if r.scored is None else _number(getattr(r.scored, name)[i]))

    def mean(name: str) -> list[float | None]:
        return _means(made(name), [t.loss_mask for _, _, t in rows])

    columns: dict[str, object] = {
        "uid": each(lambda r, i, t: r.group.prompt.uid), "sample": each(lambda r, i, t: i),
        "row": each(lambda r, i, t: r.group.prompt.row), "data_set": each(lambda r, i, t: r.group.prompt.data_set),
        "prompt": each(lambda r, i, t: _prompt(r.group.prompt)), "response": each(lambda r, i, t: r.texts[i]),
        "token_ids": _lists([t.token_ids for _, _, t in rows], pa.int32()),
        "loss_mask": _lists([t.loss_mask for _, _, t in rows], pa.bool_()),
        "versions": _lists([t.versions for _, _, t in rows], pa.int32()),
        "sampler_logprobs": _lists([t.sampler_logprobs for _, _, t in rows], pa.float32()),
        **{name: _lists(made(name), pa.float32()) for name in MADE},
        "prompt_length": each(lambda r, i, t: t.prompt_length), "finish_reason": each(lambda r, i, t: t.finish_reason),
        "truncated": each(lambda r, i, t: t.finish_reason == FINISH_LENGTH),
        "num_turns": each(lambda r, i, t: num_turns(t)), "num_tokens": each(lambda r, i, t: t.num_loss_tokens),
        "reward": scores("rewards"), "task_reward": scores("task_rewards"),
        # Tokens of a sequence weigh alike in every aggregation: of entropies their mean is enough to know the loss.
        "advantage": mean("advantages"), "entropy": mean("entropies"),
        "parts": each(lambda r, i, t: _parts(r, i)), "engine": each(lambda r, i, t: r.engines[i]),
        **{name: own(name) for name in OWN},
    }
    return pa.table([column if isinstance(column := columns[field.name], pa.Array) else pa.array(column, field.type)
                     for field in SCHEMA], schema=SCHEMA)


def _parts(rollout: Rollout, i: int) -> list[dict[str, object]]:
    parts = {} if rollout.scored is None else rollout.scored.parts
    return [{"key": name, "value": _number(of_G[i])} for name, of_G in parts.items()]


def num_turns(trajectory: Trajectory) -> int:
    """Runs of sampled tokens."""
    mask = trajectory.loss_mask
    return int(mask[:1].sum()) + int(np.count_nonzero(mask[1:] & ~mask[:-1]))


def _of_sample(rollout: Rollout, name: str, i: int) -> np.ndarray | None:
    of_group = (rollout.made or {}).get(name)
    return None if of_group is None else of_group[i]


def _prompt(prompt: Prompt) -> str:
    """Plain text as it is, messages as JSON."""
    return prompt.text if isinstance(prompt.text, str) else json.dumps(prompt.text, ensure_ascii=False)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _means(values: Sequence[np.ndarray | None], loss_masks: Sequence[np.ndarray]) -> list[float | None]:
    """Of each row (T,) over its mask; None where it has no values, or the mask nothing. All rows at once: a call of
    numpy's for each would cost a third of the whole writing.

    >>> _means([np.float32([1, 2, 6]), None, np.float32([5])], [np.array([0, 1, 1], bool)] * 2 + [np.zeros(1, bool)])
    [4.0, None, None]
    """
    known = [i for i, row in enumerate(values) if row is not None]
    found: list[float | None] = [None] * len(values)
    if known:
        mask_S = np.concatenate([loss_masks[i] for i in known])
        values_S = np.where(mask_S, np.concatenate([values[i] for i in known]), 0.0).astype(np.float64)  # type: ignore[arg-type]
        starts = np.cumsum([0, *(len(loss_masks[i]) for i in known[:-1])])
        sums, counts = np.add.reduceat(values_S, starts), np.add.reduceat(mask_S.astype(np.int64), starts)
        for i, total, count in zip(known, sums.tolist(), counts.tolist(), strict=True):
            found[i] = total / count if count else None
    return found


def _lists(arrays: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """One list a row, of one array of numbers: as Python lists they would cost a hundred times as much."""
    missing = np.array([array is None for array in arrays], bool)
    given = [array for array in arrays if array is not None]
    lengths = [0 if array is None else len(array) for array in arrays]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(np.concatenate(given) if given else np.zeros(0), kind)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(missing))


def unpacked(trained: TrainedTokens) -> Iterator[tuple[GroupAt, int | None, dict[str, np.ndarray | None]]]:
    """Each group of a rank's answer: where it is, its update, and its tokens' values by name, of all samples."""
    ends = np.cumsum(trained.num_tokens)
    for at, update, end, length in zip(trained.groups, trained.updates, ends, trained.num_tokens, strict=True):
        yield at, update, {name: None if values is None else values[end - length : end]
                           for name, values in trained.values.items()}


def steps(run: str | Path) -> list[int]:
    """The steps whose rollouts are there, in their order."""
    return sorted(int(folder.name.removeprefix("step=")) for folder in Path(run, FOLDER).glob("step=*")
                  if any(folder.glob("[!.]*.parquet")))


def read(run: str | Path, step: int, columns: Sequence[str] | None = None) -> Table:
    """The rows of a step. UserError where there are none, or where a file isn't ours."""
    import pyarrow.parquet as pq

    files = sorted(step_folder(run, step).glob("[!.]*.parquet"))
    if not files:
        kept = steps(run)
        has = f"it has steps {kept[0]} to {kept[-1]}, {len(kept)} of them" if kept else "it has none at all"
        raise UserError(f"{run}: no rollouts of step {step} are kept; {has} (observability.rollouts_max_gib bounds "
                        "them, the oldest steps are thinned first)")
    tables = []
    for file in files:
        try:
            tables.append(pq.ParquetFile(file).read(columns=None if columns is None else list(columns)))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{file} can't be read: {' '.join(str(error).split())[:200]}") from None
    return pa.concat_tables(tables, promote_options="default")


def groups_of(table: Table) -> list[Rollout]:
    """The groups of `read`'s rows, by their uid and attempt, samples in order. They hold no columns of the data."""
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault((row["uid"], row["attempt"]), []).append(row)
    return [_group([*sorted(of_group, key=lambda row: row["sample"])]) for _, of_group in sorted(rows.items())]


def _group(rows: list[dict[str, Any]]) -> Rollout:
    first = rows[0]
    trajectories = tuple(Trajectory(
        np.array(row["token_ids"], np.int32), np.array(row["loss_mask"], bool),
        np.array(row["sampler_logprobs"], np.float32), np.array(row["versions"], np.int32),
        prompt_length=row["prompt_length"], finish_reason=row["finish_reason"]) for row in rows)
    prompt = Prompt(first["uid"], first["row"], first["prompt"], trajectories[0].token_ids[: first["prompt_length"]],
                    {}, num_samples=len(rows), seed=0, data_set=first["data_set"])
    made = {name: None if first[name] is None else [np.array(row[name], np.float32) for row in rows] for name in MADE}
    # Spread over the tokens again: see table_of.
    made["entropies"] = None if any(row.get("entropy") is None for row in rows if row["num_tokens"]) else [
        np.full(len(row["token_ids"]), row["entropy"] or 0.0, np.float32) for row in rows]
    group = RolloutGroup(prompt, trajectories)
    return Rollout(group, first["attempt"], [row["response"] for row in rows], _scored(group, rows), first["outcome"],
                   first["worker"], [row["engine"] for row in rows], first["generate_s"], first["score_s"],
                   first["reference_s"], first["update"], made)


def _scored(group: RolloutGroup, rows: list[dict[str, Any]]) -> ScoredGroup:
    def floats(values: Sequence[float | None]) -> np.ndarray:
        return np.array([math.nan if value is None else value for value in values], np.float64)

    parts = [{part["key"]: part["value"] for part in row["parts"]} for row in rows]
    names = dict.fromkeys(name for of_sample in parts for name in of_sample)
    trajectories = group.trajectories
    return ScoredGroup(
        group.prompt.uid, floats([row["reward"] for row in rows]), floats([row["task_reward"] for row in rows]),
        {name: floats([of_sample.get(name) for of_sample in parts]) for name in names},
        num_tokens=np.array([t.num_tokens for t in trajectories]),
        num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
        truncated=np.array([t.finish_reason == FINISH_LENGTH for t in trajectories]),
        oldest_version=min((t.oldest_version for t in trajectories if t.num_loss_tokens), default=-1))


def cut(run: str | Path, step: int) -> None:
    """Remove the rollouts of `step` and later, which come again, and what a killed process left half written."""
    for folder in Path(run, FOLDER).glob("step=*"):
        if int(folder.name.removeprefix("step=")) >= step:
            shutil.rmtree(folder, ignore_errors=True)
    for temporary in Path(run, FOLDER).glob("step=*/.*.tmp"):
        temporary.unlink(missing_ok=True)


class KeptRollouts:
    """The bytes that each step's rollouts have on disk, and their bound. Small: two numbers a step."""

    def __init__(self, run: str | Path, max_gib: float) -> None:
        self._run, self._max_bytes = Path(run), max_gib * GIB
        self._bytes = {step: sum(file.stat().st_size for file in step_folder(run, step).iterdir())
                       for step in steps(run)}

    def written(self, step: int, num_bytes: int) -> None:
        """Take a step into account. While there is too much, a step of the older half goes.

        Of that half those go first whose numbers have the fewest factors of two: what is left is evenly spread, ever
        thinner with age.
        """
        self._bytes[step] = num_bytes
        while sum(self._bytes.values()) > self._max_bytes and len(self._bytes) > 1:
            known = sorted(self._bytes)
            gone = min(known[: len(known) // 2], key=lambda one: (one & -one or math.inf, one))
            shutil.rmtree(step_folder(self._run, gone), ignore_errors=True)
            del self._bytes[gone]
