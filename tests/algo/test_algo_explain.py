"""`flux-ray explain`: the objective in words, from the config that would train."""

from __future__ import annotations

import pytest

from flux_ray import FluxConfig, algo
from flux_ray.algo.estimators import EPS_STD, ESTIMATORS
from flux_ray.algo.explain import explain
from flux_ray.algo.kl import KL_ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.algo.objective import CORRECTIONS
from flux_ray.algo.preferences import FORMULAS
from flux_ray.batch import AGGREGATIONS
from flux_ray.config import OBJECTIVES, PAIRS, options, options_of
from flux_ray.errors import UserError
from flux_ray.formula import full_name

pytestmark = pytest.mark.unit


def text_of(**values) -> dict[str, str]:
    return dict(explain(FluxConfig(**values)))


def test_everything_of_ours_has_its_formula_and_source():
    """What others registered in this process is not ours to know."""
    ours = [entry for registry in (ESTIMATORS, POLICY_LOSSES) for entry in registry.values() if entry.ours]
    entries = [*ours, *AGGREGATIONS.values(), *KL_ESTIMATORS.values(), *CORRECTIONS.values()]
    for formula in (*(entry.formula for entry in entries), *FORMULAS.values()):
        assert formula.text and formula.source
    assert set(FORMULAS) == {name for name, cls in OBJECTIVES.items() if cls.learns_from == PAIRS}


def test_formulas_name_the_options_that_the_code_reads():
    keys = {key for key, _ in options()}
    for entry in [*ESTIMATORS.values(), *POLICY_LOSSES.values()]:
        if entry.ours:
            assert {full_name(option) for option in entry.formula.options} <= keys
            assert set(entry.formula.options) <= set(entry.reads)
    unnamed = {(name, option) for registry in (ESTIMATORS, POLICY_LOSSES) for name, entry in registry.items()
               for option in set(entry.reads) - set(entry.formula.options) if entry.ours}
    # dr_grpo never divides, whatever is set; cispo's bound is clip_range where clip_range_high isn't set.
    assert unnamed == {("dr_grpo", "normalize_by_std"), ("cispo", "clip_range")}
    for name, formula in FORMULAS.items():
        own = {key for key, _ in options_of(OBJECTIVES[name]) if key.startswith("algo.")} - {"algo.name"}
        assert {f"algo.{option}" for option in formula.options} == own


def test_the_epsilon_of_the_text_is_that_of_the_code():
    assert EPS_STD == 1e-6
    assert "(std + 1e-6)" in text_of()["advantage A"] and "(std + 1e-6)" in ESTIMATORS["reinforce_pp"].formula.text


@pytest.mark.parametrize(("values", "advantage"), [
    ({}, "(R − mean over the group) / (std + 1e-6), std over the group with ddof 1"),
    ({"algo.normalize_by_std": False}, "R − mean over the group"),
    ({"algo.name": "ppo", "algo.gamma": 0.5, "algo.whiten_advantages": False},
     "Σ_{k≥0} (0.5·0.95)^k·δ_{t+k}, where δ_t = r_t + 0.5·V_{t+1} − V_t, t counts loss tokens, V after the last is 0"),
])
def test_an_advantage_follows_its_options(values, advantage):
    assert text_of(**values)["advantage A"] == advantage


def test_what_a_user_registers_explains_itself():
    """Braces that name none of its options stay; an option that isn't set has the function's own default."""
    def median(*args, index, slope=2.0, **kw): ...
    def soft(*args, **kw): ...

    try:
        algo.register_adv_estimator("median", formula="{slope}·(R − median_{i})")(median)
        algo.register_policy_loss("soft", formula="−tanh({sharpness}·log r)·A, clipped at {clip_range}")(soft)
        algo.register_policy_loss("silent", ratio=False)(soft)
        lines = text_of(**{"algo.estimator": "median", "algo.policy_loss": "soft", "algo.options": {"sharpness": 3}})
        assert lines["advantage A"] == "2·(R − median_{i})"
        assert lines["policy term"] == "−tanh(3·log r)·A, clipped at 0.2"
        assert lines["ratio"].startswith("the registered loss's own, of π and π_old")
        assert "{slope}" not in text_of(**{"algo.estimator": "median", "algo.options": {"slope": 4}})["advantage A"]
        lines = text_of(**{"algo.policy_loss": "silent"})
        assert (lines["policy term"], lines["ratio"]) == ("what the registered loss silent gives", "none")
    finally:
        for registry, name in ((ESTIMATORS, "median"), (POLICY_LOSSES, "soft"), (POLICY_LOSSES, "silent")):
            registry.pop(name, None)


@pytest.mark.parametrize("name", algo.ALGORITHMS)
def test_every_algorithm_is_explained(name):
    lines = text_of(**{"algo.name": name})
    assert algo.ALGORITHMS[name].aggregation in lines["algorithm"]
    assert all(lines.values()) and "{clip" not in "".join(lines.values())


def test_signs_clips_and_denominators_are_the_configs():
    lines = text_of(**{"algo.clip_range_high": 0.28, "algo.entropy_coef": 0.02, "rollout.max_tokens": 99})
    assert lines["minimised"] == "Σ over loss tokens of w·(policy term + 0.01·KL − 0.02·H)"
    assert lines["policy term"] == "−min(r·A, clip(r, 1 − 0.2, 1 + 0.28)·A)"
    assert "99" in text_of(**{"algo.name": "dr_grpo", "rollout.max_tokens": 99})["weight w"]
    assert "at most 3·|A|" in text_of(**{"algo.dual_clip": 3.0})["policy term"]


def test_which_policy_enters_the_ratio():
    assert "π_old is sg[π]" in text_of()["ratio"] and "never binds" in text_of()["ratio"]
    assert "computed by the trainer before the first update" in text_of(**{"algo.mini_batches": 2})["ratio"]
    assert text_of(**{"algo.old_logprobs": "sampler"})["ratio"] == "r = π/μ per token"
    truncated = {"algo.off_policy": "tis", "algo.tis_cap": 3.0}
    assert text_of(**truncated)["correction"] == "policy term × sg(min(ρ, 3)), ρ = π_old/μ per token"
    of_sequences = {"algo.off_policy": "icepop", "algo.off_policy_level": "sequence"}
    assert text_of(**of_sequences)["correction"] == (
        "policy term × sg(ρ) inside [0.5, 5], 0 outside, ρ = exp(Σ_t log π_old/μ), one per sequence")


def test_where_the_kl_is_and_which():
    assert text_of(**{"algo.name": "reinforce_pp_baseline"})["KL"].startswith("in the loss, weight 0.01: k2 =")
    assert text_of(**{"algo.name": "rloo"})["KL"].startswith("in the reward, weight 0.05, fixed")
    assert "adapted to 6 nats" in text_of(**{"algo.name": "rloo", "algo.kl_target": 6.0})["KL"]
    assert text_of(**{"algo.name": "dapo"})["KL"] == "none: no reference is loaded"


def test_what_is_trained_and_what_the_reference_is():
    assert text_of()["trained"] == "all weights" and text_of()["π_ref"].startswith("the policy as it was loaded")
    lines = text_of(**{"train.lora.rank": 8, "train.lora.targets": ["q_proj", "v_proj"]})
    assert lines["trained"] == "LoRA: B and A of W + 2·B·A, rank 8, on q_proj, v_proj; W stays"
    assert lines["π_ref"].endswith("no reference actor is started")
    lines = text_of(**{"train.lora.rank": 8, "reference.path": "teacher"})
    assert lines["π_ref"] == "teacher, in reference actors"
    assert "π_ref" not in text_of(**{"train.lora.rank": 8, "algo.beta": 0.0})
    assert "LoRA" in text_of(**{"algo.name": "sft", "train.lora.rank": 8})["trained"]


def test_rewards_filter_and_masks():
    lines = text_of(**{"algo.name": "dapo", "reward.functions": ["numeric", "my.py:f"], "reward.weights": [1.0, 0.5],
                       "rollout.max_tokens": 100})
    assert lines["reward R"].startswith("1·numeric + 0.5·f; less up to 1 for length, rising over the last 20 of 100")
    assert "the same task reward" in lines["filter"] and "truncated" not in lines["masked"]
    lines = text_of(**{"algo.name": "dapo", "reward.overlong_penalty": 0.0, "filter.reward": None})
    assert "truncated" in lines["masked"] and "filter" not in lines
    lines = text_of(**{"reward.combine": "each", "reward.functions": ["numeric"]})
    assert lines["reward R"].startswith("1·z(numeric)") and lines["advantage A"] == "R − mean over the group"


def test_a_name_that_is_not_known():
    with pytest.raises(UserError, match="unknown algorithm 'grop'"):
        text_of(**{"algo.name": "grop"})
