"""DeepSpeed's settings from ours, and the learning rate."""

from __future__ import annotations

import pytest
import torch

from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.train.setup import check_deepspeed_options, deepspeed_config, learning_rate

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("options", "key", "where"), [
    ({"gradient_clipping": 1.0}, "train.deepspeed.gradient_clipping=1.0", "train.max_grad_norm"),
    ({"zero_optimization": {"stage": 2}}, "train.deepspeed.zero_optimization.stage=2", "train.zero_stage"),
    ({"optimizer": {"type": "Adam"}}, "train.deepspeed.optimizer.type='Adam'", "train.learning_rate"),
    ({"bf16": {"enabled": True}}, "train.deepspeed.bf16.enabled=True", "model.dtype"),
])
def test_a_key_that_is_ours_is_refused_by_name(options: dict, key: str, where: str) -> None:
    with pytest.raises(UserError) as error:
        check_deepspeed_options(from_dict({"train": {"deepspeed": options}}).train)
    assert key in str(error.value) and where in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "key", "meant"), [
    ({"wall_clock_brakdown": True}, "train.deepspeed.wall_clock_brakdown", "train.deepspeed.wall_clock_breakdown"),
    ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "zero_optimization.overlap_comm"),
])
def test_a_key_that_deepspeed_has_not_is_refused_with_the_nearest(options: dict, key: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        check_deepspeed_options(from_dict({"train": {"deepspeed": options}}).train)
    assert f"{key}'" in str(error.value) and f"{meant}'?" in str(error.value) and "\n" not in str(error.value)


def test_other_options_pass_through() -> None:
    config = from_dict({"train": {"zero_stage": 3, "deepspeed": {
        "zero_optimization": {"stage3_prefetch_bucket_size": 10}, "wall_clock_breakdown": True}}})
    result = deepspeed_config(config.train, torch.float32)
    assert result["zero_optimization"] == {"stage": 3, "stage3_prefetch_bucket_size": 10}
    assert result["wall_clock_breakdown"] is True
    assert "bf16" not in result
    assert deepspeed_config(from_dict({}).train, torch.bfloat16)["zero_optimization"]["stage"] == 1


def test_learning_rate() -> None:
    def rates(schedule: str, warmup: int = 2) -> list[float]:
        train = from_dict({"train": {"learning_rate": 1.0, "warmup_steps": warmup, "schedule": schedule}}).train
        return [learning_rate(train, update, 6) for update in range(8)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates("cosine")[2:] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6)
    assert rates("constant", warmup=0)[0] == 1
