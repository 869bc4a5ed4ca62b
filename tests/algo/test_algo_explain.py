"""`flux-ray explain`: the objective in words, from the config that would train."""

from __future__ import annotations

import pytest

from flux_ray import FluxConfig, algo
from flux_ray.algo.explain import ADVANTAGES, POLICY_TERMS, WEIGHTS, explain
from flux_ray.batch import AGGREGATIONS
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


def text_of(**values) -> dict[str, str]:
    return dict(explain(FluxConfig(**values)))


def test_everything_of_ours_has_its_formula():
    """What others registered in this process is not ours to know."""
    assert {name for name, e in algo.estimators.ESTIMATORS.items() if e.ours} == set(ADVANTAGES)
    assert {name for name, e in algo.losses.POLICY_LOSSES.items() if e.ours} == set(POLICY_TERMS)
    assert set(AGGREGATIONS) == set(WEIGHTS)


@pytest.mark.parametrize("name", algo.ALGORITHMS)
def test_every_algorithm_is_explained(name):
    lines = text_of(**{"algo.name": name})
    assert algo.ALGORITHMS[name].aggregation in lines["algorithm"]
    assert all(lines.values()) and "{" not in "".join(lines.values())


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
    assert text_of(**{"algo.off_policy": "tis", "algo.tis_cap": 3.0})["correction"].endswith("sg(min(π_old/μ, 3))")
    assert "inside [0.5, 5]" in text_of(**{"algo.off_policy": "icepop"})["correction"]


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
