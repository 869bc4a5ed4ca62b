"""Memory of training a 29M-parameter model with LoRA against training all its weights: one rank, on CPU, fp32.

Takes:  nothing; run it: python -m benchmarks.bench_lora_memory
Gives:  a line per variant: MiB of weights, optimizer state (fp32 copies included) and gradients that are alive, and the
        process's resident memory before the first step (libraries and weights) and its peak (VmHWM) over three
        supervised steps of that many tokens.
Knows:  tensors are counted once by their storage, so that views and buckets don't count twice; each variant has a
        process of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from flux_ray.config import from_dict
from flux_ray.records import Sample
from flux_ray.train import Trainer
from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer
from tests.train.ranks import free_port

MIB = 2**20
RANK = 8
SEQUENCES, LONGEST = 8, 256
VARIANTS = [(zero_stage, rank, length) for length in (16, LONGEST) for zero_stage in (0, 1) for rank in (0, RANK)]


def make_model(folder: Path) -> None:
    config = Qwen3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, LoRA of rank {RANK} on every linear layer, fp32, 1 rank")


def alive_mib() -> float:
    """Of all tensors that Python reaches, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values()) / MIB


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure(folder: Path, zero_stage: int, rank: int, length: int) -> dict[str, Any]:
    config = from_dict({
        "model": {"path": str(folder)}, "algo.name": "sft",
        "train": {"zero_stage": zero_stage, "warmup_steps": 0, "lora": {"rank": rank}},
        "batch.max_tokens_per_micro_batch": SEQUENCES * length,
    })
    trainer = Trainer(config, rank=0, world_size=1, master_address="127.0.0.1", master_port=free_port(), device="cpu")
    mask = np.arange(length) > 0
    ids = np.random.default_rng(0).integers(0, 4096, (SEQUENCES, length)).astype(np.int32)
    samples = [Sample(row, mask, np.zeros(length, np.float32)) for row in ids]
    step = trainer.engine._optimizer_step
    before_step: list[float] = []

    def watched(rate: float, divisor: float) -> float:
        before_step.append(alive_mib())
        return step(rate, divisor)

    trainer.engine._optimizer_step = watched  # type: ignore[method-assign]
    before = resident_mib("VmRSS")
    for _ in range(3):
        trainer.sft_step(samples)
    after = alive_mib()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / MIB
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"zero": zero_stage, "lora": rank, "trained": trained, "weights": weights, "state": after - weights,
            "gradients": before_step[-1] - after, "before": before, "peak": resident_mib("VmHWM")}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        print("tokens ZeRO rank    trained  weights   state gradients before   peak  (MiB)")
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.bench_lora_memory", folder, *map(str, variant)]
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
            m = json.loads(output.splitlines()[-1])
            print(f"{SEQUENCES * variant[2]:>6} {m['zero']:>4} {m['lora']:>4} {m['trained']:>10} {m['weights']:>8.1f} "
                  f"{m['state']:>7.1f} {m['gradients']:>9.1f} {m['before']:>6.0f} {m['peak']:>6.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
    else:
        main()
