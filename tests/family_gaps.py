"""A family's tiny model in a real engine and in the trainer: how far their log-probs are apart, over two updates.

Gives:  `measure`, for tests; `python -m tests.family_gaps` writes what it gives for every family into docs/models.md.
Knows:  no Ray and no DeepSpeed: the policy learns by plain AdamW, its weights go over the real weight channel.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from flux_ray.batch import make_micro_batch
from flux_ray.config import Config, LoraConfig, from_dict
from flux_ray.driver.agreement import Agreement
from flux_ray.errors import UserError
from flux_ray.messages import Attested
from flux_ray.model import PolicyModel, adapt, load_policy, policy_traits, turns
from flux_ray.records import Sample, SamplingRequest
from flux_ray.rollout.engine import RolloutEngine, engine_env
from flux_ray.rollout.known_models import check_served
from flux_ray.train import full_weights
from flux_ray.weights.publish import Publisher
from tests.families import CONTEXT, FAMILIES, NOTES, make_family

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by `python -m tests.family_gaps` -->", "<!-- families end -->"
TEMPERATURE = 0.7
UPDATES = 2
LEARNING_RATE = 3e-3  # moves a tiny model's log-probs by nats within two updates
LORA_LEARNING_RATE = 3e-2  # of factors, of which one begins at 0


class _Weights:
    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy

    def weight_metadata(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        return full_weights.metadata(self._policy)

    def iter_weights(self, bucket_bytes: int) -> Iterator[tuple[str, Any]]:
        return full_weights.iter_weights(self._policy, bucket_bytes)


def options(folder: Path) -> Config:
    return from_dict({
        "model.path": str(folder), "rollout.temperature": TEMPERATURE, "rollout.max_model_len": CONTEXT,
        "rollout.max_tokens": 8, "rollout.max_num_seqs": 16, "rollout.kv_cache_gib": 0.05, "weights.deadline_s": 60.0})


def micro_batch(samples: list[Sample]) -> Any:
    return make_micro_batch(samples, sample_ids=range(len(samples)))


async def sampled(engine: RolloutEngine, lengths: list[int], seed: int) -> tuple[list[Sample], np.ndarray]:
    """What the engine samples behind random prompts of these lengths, and its log-probs of all that."""
    rng = np.random.default_rng(seed)
    samples, logprobs = [], []
    for length in lengths:
        prompt = rng.integers(3, 64, length).astype(np.int32)
        request = SamplingRequest(prompt, 1, seed=seed + length, temperature=TEMPERATURE, max_tokens=8, probes=True)
        (completion,) = (await engine.generate(request)).completions
        tokens = np.concatenate([prompt, completion.token_ids])
        samples.append(Sample(tokens, np.arange(len(tokens)) >= length, np.zeros(len(tokens), np.float32)))
        logprobs.append(completion.logprobs)
    return samples, np.concatenate(logprobs)


def by_policy(policy: PolicyModel, samples: list[Sample]) -> torch.Tensor:
    packed = micro_batch(samples)
    logprobs_S, _ = policy(packed, temperature=TEMPERATURE, with_entropy=False)
    return logprobs_S[packed.loss_mask_S]


def by_eager(folder: Path, samples: list[Sample]) -> np.ndarray:
    """By the family's own file in transformers."""
    hf, rows = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), []
    for sample in samples:
        ids = torch.tensor(sample.token_ids, dtype=torch.long)
        with torch.no_grad():
            logprobs_TV = (hf(ids[None]).logits[0].float() / TEMPERATURE).log_softmax(-1)
        rows.append(logprobs_TV[:-1].gather(1, ids[1:, None])[sample.loss_mask[1:], 0])
    return torch.cat(rows).numpy()


async def measure(name: str, folder: Path, *, lora: LoraConfig | None = None) -> dict[str, float]:
    """Largest gaps in nats: engine against the family's own file before any update, engine against trainer before and
    after each of two. With `lora` its factors alone are trained."""
    make_family(name, folder)
    policy = load_policy(folder, dtype=torch.float32, chunk_tokens=64).eval()
    if lora is not None:
        policy.adapter = adapt(policy.hf, lora, seed=0, train_head=False)
    engine = RolloutEngine(options(folder), index=0, device="cpu", dtype="float32", weights_backend="gloo")
    os.environ.update(engine_env("cpu", options(folder).rollout))
    lengths = Agreement(options(folder).rollout, model=str(folder), dtype="float32", context=CONTEXT,
                        turns=turns(folder)).lengths(4)
    await engine.start()
    try:
        samples, logprobs = await sampled(engine, lengths, seed=1)
        gaps = {"eager": float(np.abs(by_eager(folder, samples) - logprobs).max())}
        publish, close = await channel(engine, policy)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad],
                                      lr=LEARNING_RATE if lora is None else LORA_LEARNING_RATE)
        before = by_policy(policy, samples).detach().numpy()
        gaps["start"] = float(np.abs(before - logprobs).max())
        for update in range(1, UPDATES + 1):
            optimizer.zero_grad()
            by_policy(policy, samples).sum().backward()
            optimizer.step()
            await publish(update)
            again, logprobs = await sampled(engine, lengths, seed=10 + update)
            gaps[f"update {update}"] = float(np.abs(by_policy(policy, again).detach().numpy() - logprobs).max())
        gaps["moved"] = float(np.abs(by_policy(policy, samples).detach().numpy() - before).mean())
        close()
        return gaps
    finally:
        await engine.close()


async def channel(engine: RolloutEngine, policy: PolicyModel) -> tuple[Any, Any]:
    """(publish, close): the real publisher, in a thread; its calls reach the engine on this loop."""
    loop = asyncio.get_running_loop()
    publisher = Publisher(_Weights(policy), rank=0, backend="gloo", bucket_bytes=8192, deadline_s=30.0)

    def call(method: Any, payloads: list[tuple[Any, ...]]) -> list[Any]:
        calls = [asyncio.run_coroutine_threadsafe(getattr(engine, method.__name__)(*payload), loop)
                 for payload in payloads]
        return [calling.result(timeout=60) for calling in calls]

    await asyncio.to_thread(publisher.connect, call, workers_per_engine=[1], address="127.0.0.1", port=0,
                            send_dtype="float32")

    async def publish(version: int) -> None:
        assert await asyncio.to_thread(publisher.publish, version, version) == [Attested(str(version))]

    return publish, lambda: publisher._sender.shutdown()


def rows_of(table: str) -> dict[str, str]:
    """Family ► its line."""
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    return {name: lines[name] for name in FAMILIES if name in lines}


def row(name: str) -> str:
    """The family's line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            FAMILIES[name]().save_pretrained(folder)
            policy_traits(folder)
            check_served(folder, "cpu")
            gaps = asyncio.run(measure(name, Path(folder)))
        except UserError as error:
            reason = str(error).partition(") ")[2].removesuffix(". weights.allow_logprob_gap=true trains all the same")
            return f"| {name} | — | refused at start: {reason} |"
    largest = max(gap for key, gap in gaps.items() if key != "moved")
    return f"| {name} | {largest:.0e} | {NOTES.get(name, 'as transformers')} |"


def main() -> None:
    """Measure the families that are named, or all; write their rows into docs/models.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    names = parser.parse_args().families or list(FAMILIES)
    text = DOCS.read_text(encoding="utf-8")
    head, inside, tail = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    rows = rows_of(inside)
    for name in names:
        try:
            rows[name] = row(name)
        except RuntimeError as error:  # vLLM's log says more; the others are measured all the same
            print(f"{name}: {error}", flush=True)
            continue
        print(rows[name], flush=True)
        table = ["", "", "| family | largest gap in nats (float32) | how |", "|---|---|---|",
                 *(rows[name] for name in FAMILIES if name in rows), ""]
        DOCS.write_text(f"{head}{BEGIN}" + "\n".join(table) + f"{END}{tail}", encoding="utf-8")
    os._exit(0)  # vLLM's threads would keep the process


if __name__ == "__main__":
    main()
