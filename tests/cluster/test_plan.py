import pytest

from flux_ray.cluster.plan import make_plan
from flux_ray.config import from_dict
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


def plan(gpus=0, reference=False, trains=True, algorithm="grpo", **options):
    config = from_dict({"algo.name": algorithm, **options})
    return make_plan(config, cluster_gpus=gpus, needs_reference=reference, trains=trains)


def test_on_cpu_every_role_has_its_bundles_and_every_engine_its_own_group():
    got = plan(reference=True, **{"rollout.num_engines": 2, "train.num_ranks": 2})
    assert (got.device, got.weights_backend) == ("cpu", "gloo")
    assert got.bundles() == {
        "engine": [[{"CPU": 2.0}], [{"CPU": 1.0}]],  # a rollout worker lives beside the first
        "trainer": [[{"CPU": 1.0}, {"CPU": 1.0}]],
        "reference": [[{"CPU": 1.0}]],
        "reward": [[{"CPU": 1.0}]],
    }
    assert got.total == {"CPU": 7.0}
    assert not got.shares_gpus


def engines_and_workers(**options):
    got = plan(**options)
    role = got.role("rollout")
    assert (role.cpus, role.gpus, role.inside) == (1.0, 0.0, "engine") and role.count == len(role.hosts)
    assert "rollout" not in got.bundles(), "its place is in an engine's"
    cpus = [bundle["CPU"] for (bundle,) in got.bundles()["engine"]]
    return role.hosts, cpus


@pytest.mark.parametrize(("num_engines", "hosts"), [
    (1, (0,)), (8, (0,)), (9, (0, 8)), (16, (0, 8)), (17, (0, 8, 16)),
])
def test_for_every_eight_engines_a_rollout_worker_lives_beside_the_first_of_them(num_engines, hosts):
    got, cpus = engines_and_workers(**{"rollout.num_engines": num_engines})
    assert got == hosts
    assert cpus == [2.0 if engine in hosts else 1.0 for engine in range(num_engines)]


@pytest.mark.parametrize(("num_engines", "num_workers", "hosts"), [
    (17, 1, (0,)), (17, 2, (0, 8)), (17, 4, (0, 8, 16, 3)), (4, 4, (0, 1, 2, 3)), (2, 3, (0, 1, 0)),
])
def test_a_run_may_have_more_rollout_workers_or_fewer(num_engines, num_workers, hosts):
    """Those beyond one for every eight engines live beside any."""
    got, cpus = engines_and_workers(**{"rollout.num_engines": num_engines, "rollout.num_workers": num_workers})
    assert got == hosts
    assert cpus == [1.0 + hosts.count(engine) for engine in range(num_engines)]


@pytest.mark.parametrize("gpus", [1, 64])
def test_a_rollout_worker_has_no_gpu_and_its_engine_is_not_shared_for_it(gpus):
    num_engines = 1 if gpus == 1 else 17
    got = plan(gpus=gpus, **{"rollout.num_engines": num_engines})
    assert got.role("rollout").gpus == 0.0 and got.role("rollout").inside == "engine"
    assert got.shares_gpus == (gpus == 1)
    first = got.bundles()["engine"][0]
    assert first == [{"CPU": 2.0 + (gpus == 1), "GPU": 1.0}]  # the trainer is there too, where there is one GPU
    if gpus > 1:
        assert got.bundles()["engine"][1] == [{"CPU": 1.0, "GPU": 1.0}] and got.role("engine").gpus == 1.0


def test_supervised_training_places_the_trainer_alone():
    assert [role.name for role in plan(algorithm="sft", **{"train.num_ranks": 2}).roles] == ["trainer"]


@pytest.mark.parametrize("trains", [True, False])
def test_pairs_are_trained_on_and_evaluated_by_ranks_and_a_reference(trains):
    got = plan(reference=True, algorithm="dpo", trains=trains, **{"train.num_ranks": 2})
    assert [(role.name, role.count) for role in got.roles] == [("trainer", 2), ("reference", 1)]


def test_one_gpu_holds_the_ranks_and_the_reference_of_pairs():
    got = plan(gpus=1, reference=True, algorithm="dpo")
    assert got.total["GPU"] == 1.0 and got.role("reference").inside == "trainer"
    assert plan(gpus=1, algorithm="sft").role("trainer").gpus == 1.0   # alone it has the GPU to itself


def test_without_a_kl_there_is_no_reference():
    assert plan().role("reference") is None


def test_many_gpus_are_not_shared():
    got = plan(gpus=8, reference=True, **{"rollout.num_engines": 2, "rollout.tensor_parallel_size": 2,
                                          "train.num_ranks": 3})
    assert (got.device, got.weights_backend) == ("cuda", "nccl")
    assert got.total["GPU"] == 2 * 2 + 3 + 1
    assert got.bundles()["engine"] == [[{"CPU": 2.0, "GPU": 2.0}], [{"CPU": 1.0, "GPU": 2.0}]]
    assert not got.shares_gpus


def test_one_gpu_is_shared_and_reserved_once():
    got = plan(gpus=1, reference=True)
    assert (got.device, got.weights_backend) == ("cuda", "ipc")
    assert got.total["GPU"] == 1.0
    shares = {role.name: role.gpus for role in got.roles}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert got.role("trainer").inside == "engine"


@pytest.mark.parametrize(("gpus", "options", "words"), [
    (0, {"cluster.device": "cuda"}, "no GPU"),
    (1, {"train.num_ranks": 2}, "train.num_ranks must equal rollout.num_engines"),
    (8, {"cluster.colocate": True, "rollout.tensor_parallel_size": 2}, "tensor_parallel_size=1, got 2"),
    (0, {"weights.backend": "nccl"}, "weights.backend=nccl can't work on CPU: use gloo"),
    (8, {"weights.backend": "ipc"}, "between GPUs: use nccl"),
    (8, {"weights.staging": "host"}, "weights.staging=host: nccl offers auto, none or device"),
    (0, {"weights.staging": "device"}, "weights.staging=device: gloo offers auto, none or host"),
    (1, {"weights.staging": "device"}, "weights.staging=device: ipc offers auto or none"),
])
def test_what_no_cluster_could_place_is_refused_by_name(gpus, options, words):
    with pytest.raises(UserError, match=words):
        plan(gpus=gpus, **options)


def test_more_references_than_ranks_to_live_with():
    with pytest.raises(UserError, match=r"reference\.num_actors must not exceed train\.num_ranks"):
        plan(gpus=1, reference=True, algorithm="dpo", **{"reference.num_actors": 2})


MODELS = {"reward.functions": ["numeric", "model:/a", "model:/b"], "reward.model_replicas": 2}


def test_a_critic_is_as_large_as_the_training_group_and_each_reward_model_has_its_replicas():
    got = plan(algorithm="ppo", **{"train.num_ranks": 2}, **MODELS)
    assert [(role.name, role.count) for role in got.roles] == [
        ("engine", 1), ("trainer", 2), ("critic", 2), ("reward_model", 4), ("reward", 1), ("rollout", 1)]
    assert got.bundles()["critic"] == [[{"CPU": 1.0}] * 2]   # they start together: one placement group
    alone = plan(algorithm="ppo", trains=False, **MODELS)
    assert [role.name for role in alone.roles] == ["engine", "reward_model", "reward", "rollout"]


def test_an_evaluation_shares_the_gpu_with_reward_models_alone():
    got = plan(gpus=1, trains=False, **MODELS)
    assert {role.name: role.inside for role in got.roles} == {
        "engine": None, "reward_model": "engine", "reward": None, "rollout": "engine"}
    assert got.shares_gpus and not plan(gpus=1, trains=False).shares_gpus
    assert got.total["GPU"] == 1.0


def test_on_gpus_of_their_own():
    got = plan(gpus=8, reference=True, algorithm="ppo", **{"train.num_ranks": 2}, **MODELS)
    assert got.total["GPU"] == 1 + 2 + 2 + 1 + 4 and got.weights_backend == "nccl"
    assert {role.name: role.gpus for role in got.roles}["reward"] == 0.0


def test_on_one_gpu_all_of_them_live_in_the_engines_place():
    got = plan(gpus=1, reference=True, algorithm="ppo", **MODELS)
    shares = {role.name: role.gpus * role.count for role in got.roles}
    assert got.total["GPU"] == 1.0 and 0.99 < sum(shares.values()) <= 1.0
    assert {role.name for role in got.roles if role.inside == "engine"} == {
        "trainer", "critic", "reference", "reward_model", "rollout"}
    assert got.bundles()["engine"] == [[{"CPU": 1.0 + 1 + 1 + 1 + 4 + 1, "GPU": 1.0}]]
    assert plan(gpus=1, reference=True).role("engine").gpus == 0.4   # where there is room, nobody's share is less
