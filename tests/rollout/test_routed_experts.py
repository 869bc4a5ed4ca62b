"""The experts that a real engine chose: they come with every token, and are those that the trainer would choose."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_ray.batch import make_micro_batch
from flux_ray.config import PolicyGradientConfig, changed, from_dict
from flux_ray.errors import UserError
from flux_ray.model import load_policy
from flux_ray.model.policy import PolicyModel
from flux_ray.model.routing import Routing
from flux_ray.records import Completion, Sample, SamplingRequest
from flux_ray.rollout.engine import RolloutEngine, engine_env
from flux_ray.rollout.routed_experts import check_returned
from tests.families import make_family
from tests.family_gaps import LEARNING_RATE, TEMPERATURE, channel, options
from tests.rollout.test_engine_families import MAX_GAP

LAYERS, K = 2, 2
LENGTHS = (3, 40, 40, 17)  # of prompts: one comes twice, and finds its prefix


def config_of(folder: Path) -> PolicyGradientConfig:
    return changed(options(folder), {"rollout.return_experts": True})


def sample_of(prompt: np.ndarray, completion: Completion) -> Sample:
    tokens = np.concatenate([prompt, completion.token_ids])
    mask = np.arange(len(tokens)) >= len(prompt)
    return Sample(tokens, mask, mask.astype(np.float32), experts=completion.experts,
                  sampler_logprobs=np.concatenate([np.zeros(len(prompt), np.float32), completion.logprobs]))


async def sampled(engine: RolloutEngine, *, n: int = 3) -> list[Sample]:
    samples = []
    for length in LENGTHS:
        prompt = np.random.default_rng(length).integers(3, 64, length).astype(np.int32)
        request = SamplingRequest(prompt, n, seed=length, temperature=TEMPERATURE, max_tokens=20, probes=False)
        for completion in (await engine.generate(request)).completions:
            assert completion.experts.dtype == np.uint8
            assert completion.experts.shape == (length + completion.num_tokens - 1, LAYERS, K)
            samples.append(sample_of(prompt, completion))
    return samples


def scored(policy: PolicyModel, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(gaps of log-probs, whether both chose the same experts: of every token but each sequence's last)."""
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    with torch.no_grad():
        logprobs_S, _ = policy(micro_batch, temperature=TEMPERATURE, with_entropy=False)
    agreed_S = policy.routing.agreed_S
    assert int(agreed_S.isnan().sum()) == len(samples)
    gaps = (logprobs_S - micro_batch.sampler_logprobs_S)[micro_batch.loss_mask_S].abs()
    return gaps, agreed_S[~agreed_S.isnan()]


def opened(folder: Path, dtype: str, *, replays: bool) -> PolicyModel:
    policy = load_policy(folder, dtype=getattr(torch, dtype), chunk_tokens=64).eval()
    policy.routing = Routing(policy.hf, replays=replays)
    return policy


async def over_an_update(folder: Path) -> None:
    """In float32 they are the trainer's own, before and after an update that finds a request that runs."""
    engine = RolloutEngine(config_of(folder), index=0, device="cpu", dtype="float32", weights_backend="gloo")
    os.environ.update(engine_env("cpu", config_of(folder).rollout))
    await engine.start()
    try:
        policy = opened(folder, "float32", replays=False)
        samples = await sampled(engine)
        gaps, agreed = scored(policy, samples)
        assert gaps.max() < MAX_GAP and agreed.min() == 1
        publish, close = await channel(engine, policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
        micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
        policy(micro_batch, temperature=TEMPERATURE, with_entropy=False)[0].sum().backward()
        optimizer.step()
        prompt = np.arange(3, 13, dtype=np.int32)
        request = SamplingRequest(prompt, 2, seed=5, temperature=TEMPERATURE, max_tokens=80, probes=True)
        running = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.05)
        await publish(1)
        for completion in (await running).completions:
            assert completion.experts.shape == (len(prompt) + completion.num_tokens - 1, LAYERS, K)
        again = await sampled(engine)
        gaps, agreed = scored(policy, again)
        assert gaps.max() < MAX_GAP and agreed.min() == 1
        gaps, agreed = scored(opened(folder, "float32", replays=False), again)
        assert agreed.min() == 0 and gaps.max() > 0.05, "the update moved nothing: agreement says nothing"
        close()
    finally:
        await engine.close()


@pytest.mark.system
@pytest.mark.parametrize("name", ["GLM-4 MoE", pytest.param("Mixtral", marks=pytest.mark.all)])
def test_they_are_the_trainers_own_in_float32(tmp_path: Path, name: str) -> None:
    """GLM-4 MoE has a layer without experts."""
    make_family(name, tmp_path)
    asyncio.run(over_an_update(tmp_path))


async def in_bfloat16(folder: Path) -> tuple[dict[bool, torch.Tensor], torch.Tensor]:
    engine = RolloutEngine(config_of(folder), index=0, device="cpu", dtype="bfloat16", weights_backend="gloo")
    os.environ.update(engine_env("cpu", config_of(folder).rollout))
    await engine.start()
    try:
        samples = await sampled(engine, n=16)
    finally:
        await engine.close()
    found = {replays: scored(opened(folder, "bfloat16", replays=replays), samples) for replays in (False, True)}
    return {replays: gaps for replays, (gaps, _) in found.items()}, found[False][1]


@pytest.mark.system
@pytest.mark.all  # that experts come, above; what replaying them does, tests/model/test_router_replay.py
def test_in_bfloat16_the_gap_is_smaller_with_the_engines_experts(tmp_path: Path) -> None:
    make_family("Qwen 3 MoE", tmp_path)
    gaps, agreed = asyncio.run(in_bfloat16(tmp_path))
    assert agreed.min() < 1, "both chose the same: there was nothing to replay"
    assert gaps[True].mean() < gaps[False].mean() and gaps[True].max() <= gaps[False].max()


@pytest.mark.unit
@pytest.mark.parametrize(("args", "told"), [
    ({"enable_prefix_caching": False}, "enable_prefix_caching=False"),
    ({"speculative_config": {"method": "ngram"}}, r"speculative_config=\{'method': 'ngram'\}"),
])
def test_options_with_which_vllm_gives_no_experts(args: dict, told: str) -> None:
    config = from_dict({"algo.router_replay": True, "rollout.engine_args": args})
    with pytest.raises(UserError, match=rf"^algo\.router_replay=true with rollout\.engine_args\.{told}: vLLM doesn't"):
        check_returned(config)
    check_returned(from_dict({"rollout.engine_args": args}))
