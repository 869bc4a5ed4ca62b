"""What only a GPU can show: the log-prob path, a training step's share of the GPU, an update of the weights.

    python -m benchmarks.bench_gpu [--only head,train,publish] [--peak TFLOPS]

One JSON line each. head: forward and backward of log-probs and entropy at 8 x 4,096 tokens and 152k words, ours, whole
logits, and a fused kernel (liger-kernel, where it is installed). train: our step of a model of Qwen2.5-0.5B's shape
against bare transformers on the same tokens, as a share of what the GPU multiplies a second. publish: the same model
sent to an engine that shares the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.parts import run_part
from benchmarks.work import log_normal
from flux_ray.model import head as head_room
from flux_ray.records import FINISH_STOP, Prompt, RolloutGroup, ScoredGroup, Trajectory

TOKENS, HIDDEN, VOCAB = 8 * 4096, 896, 151_936
LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 24, 14, 2, 4864
MEAN_TOKENS, PROMPT_TOKENS, MICRO_BATCH_TOKENS = 1024, 64, 16_384
GROUP_SIZE = 8
GIB = 2**30
DEVICE = "cuda:0"
ROUNDS, WARM_UP, STEPS = 5, 2, 3


HeadPass = Callable[[Tensor, Tensor, Tensor], None]  # hidden states, weight, targets


def tell(name: str, **values: Any) -> None:
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"name": name, **rounded}), flush=True)


def peak_tflops() -> float:
    """Of a large bf16 product on random numbers: what this GPU does, whatever its data sheet says."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_s(lambda: a @ b)
    return 2 * 8192**3 / seconds / 1e12


def median_s(step: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds by the GPU's own clock, after a warm-up."""
    taken = []
    for _ in range(WARM_UP + rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken[WARM_UP:])


# -- the log-prob path -----------------------------------------------------------------------------------------------


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """As it is first written: all logits in fp32, their log-softmax, its entropy without gradients."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    with torch.no_grad():
        torch.stack([-(rows.exp() * rows).sum(-1).mean() for rows in log_p.split(1024)])
    log_p.gather(1, targets[:, None]).sum().backward()


def ours(compiled: bool, trains_entropy: bool) -> HeadPass:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        rows = torch.arange(len(hidden), device=hidden.device)
        how = head_room.Chunking(1.0, 1024, True)
        with plain_passes() if not compiled else contextlib.nullcontext():
            logprobs, entropy = head_room._ChunkedLogprobs.apply(hidden, weight, None, rows, targets, how)
            (logprobs.sum() + (0.01 * entropy.sum() if trains_entropy else 0.0)).backward()

    return run


@contextlib.contextmanager
def plain_passes() -> Iterator[None]:
    """Without the compiler."""
    passes = head_room._passes
    head_room._passes = lambda _: (head_room.measure, head_room.differentiate)  # type: ignore[assignment]
    try:
        yield
    finally:
        head_room._passes = passes


def fused_library() -> HeadPass | None:
    """liger-kernel's cross-entropy of a linear layer: log-probs alone, no entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets).backward()


def head() -> None:
    kinds = {"whole_logits": whole_logits, "ours_eager": ours(False, False), "ours": ours(True, False),
             "ours_entropy_trained": ours(True, True), "liger_no_entropy": fused_library()}
    for num_tokens in (TOKENS // 4, TOKENS):
        generator = torch.Generator(DEVICE).manual_seed(0)
        hidden, weight = (torch.randn(n, HIDDEN, device=DEVICE, generator=generator).bfloat16().requires_grad_()
                          for n in (num_tokens, VOCAB))
        weight.data.mul_(0.02)
        targets = torch.randint(VOCAB, (num_tokens,), device=DEVICE, generator=generator)
        floor_s = 0.0
        for name, kind in {"products_alone": products_alone, **kinds}.items():
            if kind is None:
                continue

            def step(kind: HeadPass = kind, inputs: tuple[Tensor, ...] = (hidden, weight, targets)) -> None:
                inputs[0].grad = inputs[1].grad = None
                kind(*inputs)

            gc.collect()
            torch.cuda.empty_cache()
            try:
                step()
                hidden.grad = weight.grad = None
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                peak = torch.cuda.max_memory_allocated() - before
                seconds = median_s(step)
            except torch.OutOfMemoryError:
                tell(f"head_{name}", tokens=num_tokens, error="out of memory")
                continue
            floor_s = floor_s or seconds
            tell(f"head_{name}", tokens=num_tokens, ms=1e3 * seconds, of_floor=seconds / floor_s, peak_gib=peak / GIB)


def products_alone(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The three products that nobody can do without, in chunks: the floor."""
    gradient = torch.zeros_like(weight)
    for rows in hidden.detach().split(1024):
        logits = rows @ weight.detach().t()
        logits @ weight.detach()
        gradient.addmm_(logits.t(), rows)


# -- a training step -------------------------------------------------------------------------------------------------


def make_large(folder: Path, seed: int = 0) -> None:
    """Qwen2.5-0.5B's shape, random weights."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=8192,
        tie_word_embeddings=True, eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None, rope_theta=1e6)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def groups() -> tuple[list[RolloutGroup], list[ScoredGroup]]:
    rng = np.random.default_rng(0)
    made, scores = [], []
    lengths = log_normal(MEAN_TOKENS)
    for uid in range(len(lengths) // GROUP_SIZE):
        prompt_ids = rng.integers(3, VOCAB, PROMPT_TOKENS).astype(np.int32)
        trajectories = []
        for length in lengths[uid * GROUP_SIZE : (uid + 1) * GROUP_SIZE]:
            ids = np.concatenate([prompt_ids, rng.integers(3, VOCAB, length).astype(np.int32)])
            mask = np.arange(len(ids)) >= PROMPT_TOKENS
            trajectories.append(Trajectory(ids, mask, np.where(mask, -11.9, 0).astype(np.float32),
                                           np.where(mask, 0, -1).astype(np.int32), PROMPT_TOKENS, FINISH_STOP))
        made.append(RolloutGroup(Prompt(uid, uid, "", prompt_ids, {}, GROUP_SIZE, 0), tuple(trajectories)))
        rewards = rng.normal(size=GROUP_SIZE)
        scores.append(ScoredGroup(
            uid=uid, rewards=rewards, task_rewards=rewards, parts={},
            num_tokens=np.array([t.num_tokens for t in trajectories]),
            num_loss_tokens=np.array([t.num_loss_tokens for t in trajectories]),
            truncated=np.zeros(GROUP_SIZE, bool), oldest_version=0))
    return made, scores


def train(peak: float) -> None:
    from flux_ray import ports
    from flux_ray.config import from_dict
    from flux_ray.train import Trainer

    made, scores = groups()
    lengths = [t.num_tokens for group in made for t in group.trajectories]
    flops = step_flops(lengths)
    about = {"tokens": sum(lengths), "longest": max(lengths), "peak_tflops": peak}
    with tempfile.TemporaryDirectory() as folder:
        make_large(Path(folder))
        bare_s = bare_step_s(Path(folder), lengths)
        tell("train_bare", step_s=bare_s, mfu=flops / bare_s / peak / 1e12, **about)
        gc.collect()
        torch.cuda.empty_cache()
        for layout in ("varlen", "padded"):
            config = from_dict({
                "model.path": folder, "model.dtype": "bfloat16", "model.layout": layout, "algo.beta": 0.0,
                "batch.max_tokens_per_micro_batch": MICRO_BATCH_TOKENS, "rollout.group_size": GROUP_SIZE,
                "train.learning_rate": 1e-6})
            trainer = Trainer(config, rank=0, world_size=1, master_address="127.0.0.1", master_port=ports.reserve(),
                              device=DEVICE)
            taken = []
            torch.cuda.reset_peak_memory_stats()
            for version in range(WARM_UP + STEPS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                trainer.train_step(groups=made, scores=scores, reference_logprobs=None, version=version)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
            step_s = statistics.median(taken[WARM_UP:])
            tell(f"train_{layout}", step_s=step_s, of_bare=step_s / bare_s, mfu=flops / step_s / peak / 1e12,
                 peak_gib=torch.cuda.max_memory_allocated() / GIB, **about)
            del trainer
            gc.collect()
            torch.cuda.empty_cache()


def step_flops(lengths: Sequence[int]) -> float:
    """Forward and backward: 6 a weight and token, and 12 a layer, hidden number and pair of tokens, of which causality
    leaves half (Chowdhery et al. 2022, PaLM, appendix B). What is done twice doesn't count."""
    head_dim = HIDDEN // HEADS
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * head_dim
    weights = LAYERS * (attention + 3 * HIDDEN * INTERMEDIATE) + HIDDEN * VOCAB
    return 6.0 * weights * sum(lengths) + 6.0 * LAYERS * HIDDEN * sum(n * n for n in lengths)


def bare_step_s(folder: Path, lengths: Sequence[int]) -> float:
    """transformers' model on the same tokens in the same rows, its logits whole, cross-entropy and torch's AdamW."""
    from transformers import AutoModelForCausalLM

    from flux_ray.model import varlen

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    model.set_attn_implementation(varlen.TORCH_VARLEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows: list[list[int]] = [[]]
    for length in sorted(lengths, reverse=True):
        if sum(rows[-1]) + length > MICRO_BATCH_TOKENS:
            rows.append([])
        rows[-1].append(length)
    batches = [(torch.randint(3, VOCAB, (1, sum(row)), device=DEVICE),
                torch.cat([torch.arange(n) for n in row])[None].to(DEVICE),
                nn.functional.pad(torch.tensor(row).cumsum(0), (1, 0)).int().to(DEVICE), max(row)) for row in rows]

    def step() -> None:
        for ids, positions, borders, longest in batches:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=borders,
                           cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest).logits[0]
            (nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum") / sum(lengths)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_s(step, STEPS)


# -- weights ---------------------------------------------------------------------------------------------------------


def publish(deadline_s: float = 300.0, steps: int = 10) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_large(folder / "large")
        gc.collect()
        torch.cuda.empty_cache()
        for backend in ("ipc", "gloo"):
            gave = run_part(
                "publish", folder, deadline_s=deadline_s, steps=steps,
                env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, **{  # 0 is for CPUs
                    "cluster.device": "cuda", "cluster.colocate": True, "rollout.num_engines": 1,
                    "model.path": str(folder / "large"), "model.dtype": "bfloat16", "weights.backend": backend,
                    "rollout.engine_args": {"enforce_eager": True}})
            size = (folder / "large" / "model.safetensors").stat().st_size
            for figure, values in gave.items():
                tell(f"publish_{backend}_{figure}", value=statistics.median(values), runs=len(values),
                     megabytes=round(size / 1e6), longest=max(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="head,train,publish")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the GPU in bf16 (a product of 8,192 cubed is timed)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    asked = arguments.only.split(",")
    peak = arguments.peak or peak_tflops()
    tell("gpu", gpu=torch.cuda.get_device_name(), torch=torch.__version__, product_tflops=peak)
    if "head" in asked:
        head()
    if "train" in asked:
        train(peak)
    if "publish" in asked:
        publish()


if __name__ == "__main__":
    main()
