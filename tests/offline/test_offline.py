"""The short loop: what each kind of data asks of the ranks, when it is evaluated; the reference is asked once."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flux_ray.config import Config, ReferenceConfig, ReferencedConfig, from_dict
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.data.sets import TRAIN, read_sets
from flux_ray.observability.run_folder import EVAL, METRICS, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.offline import kept_reference
from flux_ray.offline.data import OfflineData
from flux_ray.offline.kept_reference import KeptReference
from flux_ray.offline.loop import OfflineLoop, make_learner, perplexity
from flux_ray.offline.stages import OfflineStages
from flux_ray.records import LoopState, PreferencePair, RolloutGroup, StepReport
from flux_ray.run.recorder import Recorder
from flux_ray.run.training import Training
from tests.fakes.actors import LocalGroup
from tests.tiny import tiny_tokenizer
from tests.train.batches import pairs

pytestmark = pytest.mark.unit

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "x"} for i in range(12)]
GROUPS = [{"prompt": f"{i}+{i}=", "responses": [str(2 * i), "x"], "rewards": [1, 0]} for i in range(12)]
STEPS = 5
A_FOLDER = str(Path(__file__).parent)  # in the place of a model: nobody asks a hub what it says of its end tokens


@dataclass
class Noting:
    """A training rank, or a reference actor, that notes what it is given."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def pair_step(self, *, pairs: Any, reference_logprobs: Any) -> StepReport:
        self.calls.append(("pair_step", reference_logprobs))
        assert reference_logprobs is None or len(reference_logprobs) == len(pairs) > 0
        return self._report("pair_step")

    def _report(self, method: str) -> StepReport:
        return StepReport(sum(call == method for call, _ in self.calls), {"train/loss": 0.5})

    def pair_metrics(self, *, pairs: Any, reference_logprobs: Any) -> dict[str, float]:
        self.calls.append(("pair_metrics", len(pairs)))
        return {"train/loss": 0.4, "pairs/accuracy": 1.0, "pairs/margin": 0.2}

    def pair_reference(self, pairs: Any) -> list[tuple[float, float]]:
        self.asked += [pair.row for pair in pairs]
        return [(-1.0 - pair.row, -2.0) for pair in pairs]

    def sft_step(self, samples: Any) -> StepReport:
        self.calls.append(("sft_step", len(samples)))
        return self._report("sft_step")

    def sft_metrics(self, samples: Any) -> dict[str, float]:
        self.calls.append(("sft_metrics", len(samples)))
        return {"train/loss": 0.4, "train/num_tokens": 7.0}

    def train_step(self, *, groups: Any, scores: Any, reference_logprobs: Any, step: int) -> StepReport:
        assert [group.prompt.uid for group in groups] == [score.uid for score in scores]
        for group, logprobs in zip(groups, reference_logprobs or [], strict=reference_logprobs is not None):
            assert all((of_sample == -group.prompt.row).all() for of_sample in logprobs), "each has its own"
        self.calls.append(("train_step", (len(groups), step, reference_logprobs)))
        return StepReport(step + 1, {"actor/loss": 0.5})

    async def pair_logprobs(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        return self.pair_reference(pairs)

    async def group_logprobs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        self.asked += [group.prompt.row for group in groups]
        return [[np.full(t.num_tokens, -group.prompt.row, np.float32) for t in group.trajectories]
                for group in groups]


def run(config: Config, data: OfflineData, folder: Path, *, ranks: list[Noting], reference: Noting | None) -> None:
    async def whole() -> None:
        run_folder = RunFolder(folder)
        run_folder.create(config, resume_step=None)
        recorder = Recorder(config, folder=run_folder, terminal=Terminal(io.StringIO(), enabled=False))
        settings = config.reference if isinstance(config, ReferencedConfig) else ReferenceConfig()
        stages = OfflineStages(config.train, settings,
                               trainer=LocalGroup("trainer", lambda index: ranks[index], len(ranks)),
                               reference=LocalGroup("reference", lambda index: reference, 1) if reference else None)
        loop = OfflineLoop(make_learner(config, data=data, stages=stages, folder=run_folder),
                           size=config.batch.prompts_per_step, start=LoopState(0))
        steps: list[int] = []
        await Training(config, loop, recorder, trained=[], progress=lambda: steps.append(loop.step)).run()
        assert steps == [*range(1, STEPS + 1)], "each step is told"

    asyncio.run(whole())


def config_of(algorithm: str, **more: Any) -> Config:
    return from_dict({"algo.name": algorithm, "batch.prompts_per_step": 6, "driver.num_steps": STEPS,
                      "model.path": A_FOLDER, "eval.every": 2, "eval.data": "e", "data.shuffle": False, **more})


def test_pairs_with_evaluations_and_a_reference_that_is_asked_once(tmp_path):
    config = config_of("dpo", **{"reference.max_tokens_per_forward": 40})
    source = PairSource.from_config(config, tiny_tokenizer(), context_length=64, rows=PAIRS)
    ranks, reference = [Noting(), Noting()], Noting()
    run(config, OfflineData(source, source, ()), tmp_path, ranks=ranks, reference=reference)
    assert sorted(reference.asked) == list(range(12))   # over five steps and four evaluations
    assert [call for call, _ in ranks[0].calls] == [
        "pair_metrics", *["pair_step"] * 2, "pair_metrics", *["pair_step"] * 2, "pair_metrics", "pair_step",
        "pair_metrics"]
    assert sum(len(given) for rank in ranks for call, given in rank.calls if call == "pair_step") == 6 * STEPS
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == list(range(STEPS))
    lines = read_lines(tmp_path / EVAL)
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert {"eval/loss": 0.4, "eval/accuracy": 1.0, "eval/margin": 0.2}.items() <= lines[0].items()


@pytest.mark.parametrize("algorithm", ["reward_model", "dpo"])
def test_nobody_is_asked_without_a_reference(tmp_path, algorithm):
    more = {"algo.reference_free": True} if algorithm == "dpo" else {}
    config = config_of(algorithm, **more)
    source = PairSource.from_config(config, tiny_tokenizer(), context_length=64, rows=PAIRS)
    rank = Noting()
    run(config, OfflineData(source, None, ()), tmp_path, ranks=[rank], reference=None)
    assert rank.calls == [("pair_step", None)] * STEPS


def test_without_a_model_of_its_own_the_ranks_are_the_reference(tmp_path):
    """As with LoRA: the policy without its adapter."""
    config = config_of("dpo")
    source = PairSource.from_config(config, tiny_tokenizer(), context_length=64, rows=PAIRS)
    ranks = [Noting(), Noting()]
    run(config, OfflineData(source, None, ()), tmp_path, ranks=ranks, reference=None)
    assert sorted(ranks[0].asked + ranks[1].asked) == list(range(12))
    sums = [sums for rank in ranks for call, given in rank.calls if call == "pair_step" for sums in given]
    assert sorted(set(sums)) == sorted((-1.0 - row, -2.0) for row in range(12))


def test_completions(tmp_path):
    config = config_of("sft")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    source = SftSource.from_config(config, tiny_tokenizer(), context_length=64, rows=rows)
    rank = Noting()
    run(config, OfflineData(source, source, ()), tmp_path, ranks=[rank], reference=None)
    assert rank.calls.count(("sft_step", 6)) == STEPS and rank.calls.count(("sft_metrics", 12)) == 4
    assert read_lines(tmp_path / EVAL)[0]["eval/loss"] == 0.4


def test_an_evaluation_of_several_sets(tmp_path):
    for name, number in (("a", 5), ("b", 7)):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS[:number]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("sft", **{"eval.data": {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}})
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    train = SftSource.from_config(config, tiny_tokenizer(), context_length=64, rows=rows)
    evaluation = SftSource.for_eval(config, tiny_tokenizer(), context_length=64)
    rank = Noting()
    run(config, OfflineData(train, evaluation, ()), tmp_path / "run", ranks=[rank], reference=None)
    assert [call for call in rank.calls if call[0] == "sft_metrics"][:3] == [
        ("sft_metrics", 12), ("sft_metrics", 5), ("sft_metrics", 7)]
    line = read_lines(tmp_path / "run" / EVAL)[0]
    assert line["eval/loss"] == line["eval/a/loss"] == line["eval/b/loss"] == 0.4
    assert line["eval/perplexity"] == line["eval/a/perplexity"] == pytest.approx(math.exp(0.4))
    assert perplexity(1e4) == math.inf


def test_given_groups(tmp_path):
    config = config_of("grpo", **{"eval.data": None, "eval.every": 0})
    (loaded,) = read_sets(config, TRAIN, GROUPS)
    source = GroupSource(loaded, tiny_tokenizer(), context_length=64)
    ranks, reference = [Noting(), Noting()], Noting()
    run(config, OfflineData(source, None, ()), tmp_path, ranks=ranks, reference=reference)
    assert [given[:2] for _, given in ranks[0].calls] == [(3, step) for step in range(STEPS)]
    assert all(len(given[2]) == 3 for _, given in ranks[1].calls) and len(reference.asked) == 6 * STEPS
    lines = read_lines(tmp_path / METRICS)
    assert lines[0]["reward/mean"] == 0.5 and lines[0]["actor/loss"] == 0.5


def test_log_probs_that_have_come_are_kept_though_the_rest_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_reference, "ASKED_AT_ONCE", 3)
    some = pairs(16, 8)
    asked: list[int] = []

    async def ask(given):
        asked.append(len(given))
        if len(asked) == 2:
            raise RuntimeError("the reference died")
        return [(-1.0, -2.0)] * len(given)

    def kept() -> KeptReference:
        return KeptReference(RunFolder(tmp_path), path="m", ask=ask)

    with pytest.raises(RuntimeError, match="the reference died"):
        asyncio.run(kept().of(some))
    assert asyncio.run(kept().of(some)) == [(-1.0, -2.0)] * 8 and asked == [3, 3, 3, 2]


def test_kept_log_probs_are_of_one_reference_and_one_pair(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    batch = pairs(3, 5)
    asked: list[int] = []

    async def ask(missing: list[Any]) -> list[tuple[float, float]]:
        asked.extend(pair.row for pair in missing)
        return [(-0.1 - pair.row, -1 / 3) for pair in missing]

    async def check() -> None:
        kept = KeptReference(folder, path="a", ask=ask)
        first = await kept.of([*batch, batch[0]])
        assert asked == [0, 1, 2, 3, 4] and first[0] == first[-1] == (-0.1, -1 / 3)
        assert await kept.of(batch[::-1]) == first[:5][::-1] and len(asked) == 5
        resumed = KeptReference(RunFolder(tmp_path / "elsewhere"), path="a", ask=ask, earlier=folder.path)
        assert await resumed.of(batch) == first[:5] and len(asked) == 5   # to the last bit
        (tmp_path / "other").mkdir()
        await KeptReference(RunFolder(tmp_path / "other"), path="b", ask=ask, earlier=folder.path).of(batch[:2])
        assert asked[5:] == [0, 1]

    asyncio.run(check())
