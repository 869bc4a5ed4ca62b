"""What the actors of each role are told by their environment, and what their death means."""

import math

import pytest

from flux_ray.cluster.plan import CRITIC, ENGINE, REFERENCE, REWARD, REWARD_MODEL, ROLLOUT, TRAINER, Plan
from flux_ray.cluster.supervisor import OnDeath
from flux_ray.config import from_dict
from flux_ray.run.actors import staged
from flux_ray.run.build import KEEP_MEMORY, _env, on_death, part_tokens

pytestmark = pytest.mark.unit
ROLES = (ENGINE, ROLLOUT, REWARD, REFERENCE, TRAINER, CRITIC, REWARD_MODEL)


def test_on_cpu_a_role_computes_with_its_threads_and_those_with_a_model_of_transformers_keep_their_memory():
    env = {role: _env(from_dict({"train.num_threads": 3}), Plan("cpu", "gloo", ()), role) for role in ROLES}
    assert {role for role in ROLES if KEEP_MEMORY.items() <= env[role].items()} == {
        REFERENCE, TRAINER, CRITIC, REWARD_MODEL}
    assert {role: env[role]["OMP_NUM_THREADS"] for role in ROLES} == {
        role: "3" if role in (TRAINER, CRITIC) else "1" for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
def test_on_gpus_nothing_of_the_kind(role):
    assert not {*KEEP_MEMORY, "OMP_NUM_THREADS"} & _env(from_dict({}), Plan("cuda", "nccl", ()), role).keys()


def test_the_users_own_variables_win():
    name, value = "MALLOC_ARENA_MAX", "4"
    assert _env(from_dict({f"cluster.env.{name}": value}), Plan("cpu", "gloo", ()), TRAINER)[name] == value


@pytest.mark.parametrize(("staging", "staleness", "told"), [
    ("auto", 0, False), ("auto", 1, None), ("none", 1, False), ("host", 0, True), ("host", 1, True),
])
def test_by_itself_an_update_is_staged_where_requests_run_meanwhile(staging, staleness, told):
    assert staged(from_dict({"weights.staging": staging, "driver.max_staleness": staleness})) is told


@pytest.mark.parametrize(("values", "device", "waits"), [
    ({}, "cpu", True), ({"driver.max_staleness": 1}, "cpu", False), ({"driver.streaming": "always"}, "cpu", False),
    ({}, "cuda", False), ({"driver.streaming": "never"}, "cuda", True),
    ({"driver.streaming": "never", "driver.max_staleness": 1}, "cpu", True),
    ({"algo.name": "reinforce_pp"}, "cuda", True), ({"algo.name": "ppo"}, "cuda", True),
    ({"algo.mini_batches": 2}, "cuda", True), ({"algo.name": "rloo"}, "cuda", False),
])
def test_backward_begins_before_the_batch_is_whole_where_that_may_gain_something(values, device, waits):
    """A micro-batch for each rank, at least; what needs all rows of the step waits for all, wherever it runs."""
    config = from_dict({"train.num_ranks": 2, "batch.max_tokens_per_micro_batch": 500, **values})
    assert part_tokens(config, Plan(device, "gloo" if device == "cpu" else "nccl", ())) == (math.inf if waits else 1000)


@pytest.mark.parametrize(("values", "replaced"), [
    ({}, {ENGINE, REFERENCE, ROLLOUT}),
    ({"reward.on_failure": "drop"}, {ENGINE, REFERENCE, ROLLOUT, REWARD}),
    ({"cluster.max_restarts": 0}, {ROLLOUT}),
    ({"algo": "sft"}, {ROLLOUT})])
def test_a_run_outlives_its_engines_and_workers_and_where_it_drops_failed_rewards_its_reward_workers(values, replaced):
    policies = on_death(from_dict(values))
    assert policies.keys() == set(ROLES)
    assert {role for role, policy in policies.items() if policy is OnDeath.REPLACE} == replaced
