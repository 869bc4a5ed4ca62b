"""The frozen policy: right numbers, those who wait are answered together, failures go to whoever asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flux_ray.model.scoring import scoring_samples
from flux_ray.records import RolloutGroup, Sample
from flux_ray.reference import Reference
from tests.tiny import tiny_model
from tests.train.batches import rollout_group

pytestmark = pytest.mark.unit


class CountingReference(Reference):
    """A Reference that keeps what each forward was given, and can be held up."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        super().__init__(path, dtype=torch.float32, device="cpu", temperature=0.7, max_tokens_per_forward=max_tokens,
                         chunk_tokens=32)
        self.forwards: list[list[int]] = []
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, callers: list[Sequence[Sample]]) -> list[list[np.ndarray]]:
        self.forwards.append([len(samples) for samples in callers])
        self.begun.set()
        assert self.gate.wait(30)
        return super().forward(callers)


def wanted(hf: torch.nn.Module, group: RolloutGroup) -> list[np.ndarray]:
    rows = []
    for t in group.trajectories:
        ids = torch.from_numpy(t.token_ids).long()[None]
        with torch.no_grad():
            log_p = torch.log_softmax(hf(input_ids=ids).logits[0].float() / 0.7, -1)
        row = np.zeros(t.num_tokens, np.float32)
        row[1:] = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        rows.append(np.where(t.loss_mask, row, 0))
    return rows


async def test_groups_that_wait_are_answered_together(tmp_path) -> None:
    reference = CountingReference(tiny_model(tmp_path, tied=True), max_tokens=10_000)
    reference.gate.clear()
    groups = [rollout_group(uid) for uid in range(5)]
    calls = [asyncio.create_task(reference.logprobs(scoring_samples([groups[0]])))]
    assert await asyncio.to_thread(reference.begun.wait, 30)  # the first forward's thread holds, this loop doesn't
    calls += [asyncio.create_task(reference.logprobs(scoring_samples([g]))) for g in groups[1:]]
    await asyncio.sleep(0)
    reference.gate.set()
    results = await asyncio.wait_for(asyncio.gather(*calls), 30)
    assert reference.forwards == [[4], [4, 4, 4, 4]]  # samples of each caller
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    for group, rows in zip(groups, results, strict=True):
        for row, want in zip(rows, wanted(hf, group), strict=True):
            assert row.dtype == np.float32
            np.testing.assert_allclose(row, want, atol=1e-5)


async def test_log_probs_do_not_depend_on_who_asks_at_the_same_moment(tmp_path) -> None:
    """To the last bit, or the same seed would not give the same run."""
    reference = CountingReference(tiny_model(tmp_path, tied=True), max_tokens=10_000)
    groups = [scoring_samples([rollout_group(uid)]) for uid in range(5)]
    alone = [await asyncio.wait_for(reference.logprobs(samples), 30) for samples in groups]
    together = await asyncio.wait_for(asyncio.gather(*(reference.logprobs(samples) for samples in groups)), 30)
    assert reference.forwards == [[4]] * 5 + [[4] * 5]
    for one, other in zip(alone, together, strict=True):
        for row, again in zip(one, other, strict=True):
            np.testing.assert_array_equal(row, again)


async def test_the_token_budget_bounds_a_forward(tmp_path) -> None:
    reference = CountingReference(tiny_model(tmp_path, tied=True), max_tokens=40)
    groups = [rollout_group(uid) for uid in range(4)]
    assert all(sum(t.num_tokens for t in g.trajectories) > 20 for g in groups)
    await asyncio.wait_for(asyncio.gather(*(reference.logprobs(scoring_samples([g])) for g in groups)), 30)
    assert reference.forwards == [[4]] * 4


async def test_a_failed_forward_fails_its_callers_and_no_others(tmp_path) -> None:
    reference = CountingReference(tiny_model(tmp_path, tied=True), max_tokens=40)
    bad = rollout_group(0, vocab=64)
    bad.trajectories[0].token_ids[0] = 10_000  # beyond the vocabulary
    results = await asyncio.wait_for(
        asyncio.gather(reference.logprobs(scoring_samples([bad])),
                       reference.logprobs(scoring_samples([rollout_group(1)])), return_exceptions=True), 30)
    assert isinstance(results[0], IndexError)
    assert not isinstance(results[1], BaseException) and len(results[1]) == 4
