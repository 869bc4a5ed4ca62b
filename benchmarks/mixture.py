"""A mixture of experts of 312M parameters, of which a token uses 61M: a step against its bare parts, and publishing.

Gives:  `python -m benchmarks.mixture [--runs N] [--tokens N]`: a table, in some minutes on two cores.
Knows:  the work is that of the dense model's figures, in float32; the model's shape is Qwen3's of 30B, made small.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import inside, work
from benchmarks.figures import Measured, table
from benchmarks.parts import run_part
from benchmarks.work import CONTEXT, VOCAB, Phase, equal
from flux_ray.config import WeightsConfig
from flux_ray.config.knobs import default_of
from flux_ray.run.build import KEEP_MEMORY

MODEL, DTYPE, DEADLINE_S, MIB = "mixture", "float32", 500.0, 2**20
MEASURED = {work.MODEL: MODEL}  # in a part's environment
#: Hidden size, layers, experts, experts of a token, an expert's inner size.
HIDDEN, LAYERS, EXPERTS, CHOSEN, INNER = 512, 8, 48, 8, 512
EQUAL = "equal"
BUCKETS = 3  # goal: so many beyond the model


def make_model(folder: Path) -> tuple[int, int]:
    """Random weights. Gives the number of parameters, and of those that a token uses."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        moe_intermediate_size=INNER, norm_topk_prob=True, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)  # else all tokens have the same experts
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    unused = LAYERS * (EXPERTS - CHOSEN) * 3 * HIDDEN * INNER
    return model.num_parameters(), model.num_parameters() - unused


def ratio(folder: Path, phase: Callable[[int], dict[str, Any]], *, runs: int) -> list[Measured]:
    """A synchronous step against the sum of its bare parts, measured before and after, half the steps each; and what
    publishing took of memory in it."""

    def bare() -> list[list[float]]:
        half: dict[str, Any] = {"deadline_s": DEADLINE_S, "dtype": DTYPE, "phases": [phase(-(-runs // 2))]}
        return [run_part("vllm", folder, env=MEASURED, **half)[EQUAL],
                run_part("deepspeed", folder, env=MEASURED | KEEP_MEMORY, **half)[EQUAL]]

    before = bare()
    steps, memory = ours(folder, phase(runs))
    generation_s, training_s = (statistics.median([*a, *b]) for a, b in zip(before, bare(), strict=True))
    stages = {name: round(statistics.median(step[name] for step in steps), 2)
              for name in ("driver/step_s", "driver/wait_s", "train/step_s", "weights/publish_s")}
    values = [step["driver/step_s"] / (generation_s + training_s) for step in steps]
    return [Measured.of("mixture_ratio", values, unit="x", goal="<= 1.15", generation_s=round(generation_s, 2),
                        training_s=round(training_s, 2), **stages), *memory]


def ours(folder: Path, phase: dict[str, Any], *, alone: bool = False) -> tuple[list[dict[str, float]], list[Measured]]:
    """The metrics of each step; how far a rank's own memory grows while it publishes, and what engines see of its
    memory too. `alone`: as on a machine without engines, where an update finds no memory that it shares with them."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        env = MEASURED | {inside.MEMORY: inside.ALONE if alone else "watched"}
        steps = run_part("ours", folder, deadline_s=DEADLINE_S, env=env, work=Path(own), phases=[phase], cores={},
                         dtype=DTYPE)[EQUAL]["steps"]
        notes = [note for note in inside.read_notes(Path(own), "trainer-0") if "own_bytes" in note]
    bucket_mib = next(default_of(f) for f in dataclasses.fields(WeightsConfig) if f.name == "bucket_mib")
    ending = "_alone" if alone else ""
    return steps, [
        Measured.of(f"mixture_publish{ending}", [max(note["own_bytes"] for note in notes) / MIB], unit="MiB",
                    goal=f"<= {BUCKETS * bucket_mib}"),
        Measured.of(f"mixture_publish_shared{ending}", [max(note["shared_bytes"] for note in notes) / MIB], unit="MiB"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measured steps of ours")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of each response")
    arguments = parser.parse_args()

    def phase(runs: int) -> dict[str, Any]:
        return dataclasses.asdict(Phase(EQUAL, equal(arguments.tokens), 1, runs))

    with tempfile.TemporaryDirectory(prefix="flux-ray-mixture-") as name:
        folder = Path(name)
        parameters, used = make_model(folder / MODEL)
        print(f"{parameters / 1e6:.0f}M parameters, {used / 1e6:.0f}M of them a token's; {DTYPE}, 64 sequences of "
              f"{arguments.tokens} tokens, a thread a process", flush=True)
        results = ratio(folder, phase, runs=arguments.runs)
        print(results[0].about, table(results), sep="\n", flush=True)
        results += ours(folder, phase(1), alone=True)[1]
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
