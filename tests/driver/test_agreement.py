"""The first check of engines against the trainer: which tokens it compares, and what it tells of them."""

from __future__ import annotations

import numpy as np
import pytest

from flux_ray.config import from_dict
from flux_ray.data import PromptSource
from flux_ray.driver.agreement import MOST_TOKENS, Agreement
from flux_ray.messages import PROBE_TOKENS
from flux_ray.records import ComparedTokens
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit
NOISE = {"float32": 2e-6, "bfloat16": 1.3e-2}


def agreement(dtype: str = "float32", context: int = 100, turns: tuple[int, ...] = (), **options) -> Agreement:
    return Agreement(from_dict(options).rollout, model="the/model", dtype=dtype, context=context, turns=turns)


def compared(dtype: str, gap_at=lambda position: 0.0, *, engine: int = 0, lengths=(5, 12, 25, 50, 92)
             ) -> list[ComparedTokens]:
    """Tokens at the probes' positions; the trainer's log-prob is off by rounding, and by what the test says."""
    rng = np.random.default_rng(engine)
    made = []
    for length in lengths:
        positions = np.arange(length, length + PROBE_TOKENS)
        engines = rng.uniform(-4, -1, PROBE_TOKENS).astype(np.float32)
        noise = rng.choice([-1, 1], PROBE_TOKENS) * NOISE[dtype]
        off = np.array([gap_at(position) for position in positions])
        made.append(ComparedTokens(engine, positions, rng.integers(3, 60, PROBE_TOKENS), engines,
                                   (engines + noise + off).astype(np.float32)))
    return made


@pytest.mark.parametrize("context, turns, lengths", [
    (100, (), [5, 11, 23, 46, 92]),
    (100, (20,), [5, 11, 16, 23, 28, 46, 92]),  # on both sides of the end of the window
    (100, (100, 4096), [5, 11, 23, 46, 92]),  # which the run never leaves
    (8, (), [1]),
    (100_000, (), [5, MOST_TOKENS // 16, 256, 512, 1024, 2048]),
    (100_000, (4096,), [5, 256, 513, 1026, 2052, 4092, 4104]),
])
def test_what_is_probed_spreads_over_the_context_and_leaves_a_window(context, turns, lengths) -> None:
    assert agreement(context=context, turns=turns).lengths(5) == lengths


def test_the_probe_is_made_of_the_users_own_prompts() -> None:
    config, tokenizer = from_dict({"data.shuffle": False}), tiny_tokenizer()
    prompts = PromptSource.from_config(config, tokenizer, context_length=300, prompts=["2+3", "4=", "5"])
    probes = agreement(context=20).first_prompts(prompts)
    wanted = tokenizer("2+34=52+34=5")["input_ids"]
    assert [probe.token_ids.tolist() for probe in probes] == [wanted[:n] for n in (1, 3, 6, 12)]
    assert all(probe.num_samples == 1 for probe in probes) and len({probe.seed for probe in probes}) == 4


@pytest.mark.parametrize("dtype", NOISE)
def test_rounding_is_agreement(dtype: str) -> None:
    assert agreement(dtype).disagreement(compared(dtype)) is None
    assert agreement(dtype).disagreement([]) is None


@pytest.mark.parametrize("dtype, gap_at, told", [
    ("float32", lambda position: 0.3 if position >= 25 else 0.0, "is too large, from position 25 on"),
    ("float32", lambda position: 2e-3 if position == 95 else 0.0, "is too large, from position 95 on"),
    ("float32", lambda position: 8e-6 * position, "grows with position, from position"),
    ("bfloat16", lambda position: 0.3 if position >= 92 else 0.0, "is too large, from position 92 on"),
    ("bfloat16", lambda position: 0.05, "is too large, from position 5 on"),
])
def test_a_disagreement_names_both_sides_the_position_and_the_way_out(dtype, gap_at, told) -> None:
    good, bad = compared(dtype), compared(dtype, gap_at, engine=1)
    text = agreement(dtype).disagreement([*good, *bad])
    assert text is not None and text.startswith("engine 1 and the trainer ") and told in text and "\n" not in text
    joined = ComparedTokens.joined(bad)
    position = int(text.partition("from position ")[2].split()[0])
    i = joined.positions_N.tolist().index(position)
    assert f"{joined.engine_logprobs_N[i]:.4f} from the engine" in text
    assert f"{joined.trainer_logprobs_N[i]:.4f} from the trainer" in text
    for remedy in ("rollout.engine_args", "docs/models.md", "weights.allow_logprob_gap=true"):
        assert remedy in text
    assert ("model.dtype=float32" in text) == (dtype == "bfloat16")


def test_a_gap_that_grows_in_bf16_is_told_although_its_mean_is_small() -> None:
    tokens = compared("float32", lambda position: 0.022 if position >= 50 else 1e-3)
    assert "grows with position" in str(agreement("bfloat16").disagreement(tokens))
    assert agreement("bfloat16").disagreement(compared("float32", lambda position: 0.022)) is None


@pytest.mark.parametrize("dtype, mean, largest, told", [
    ("float32", 1e-6, 9e-4, False), ("float32", 1e-6, 2e-3, True),
    ("bfloat16", 1.3e-2, 0.5, False), ("bfloat16", 4e-2, 0.5, True),
])
def test_a_gap_in_mid_run_is_told_with_what_it_means(dtype, mean, largest, told) -> None:
    metrics = {"weights/logprob_gap_mean": mean, "weights/logprob_gap_max": largest}
    text = agreement(dtype).later(metrics)
    assert (text is not None) == told
    assert text is None or ("sample from another distribution than the trainer learns on" in text)
    assert agreement(dtype, **{"rollout.top_p": 0.9}).later(metrics) is None
    assert agreement(dtype).later({}) is None
