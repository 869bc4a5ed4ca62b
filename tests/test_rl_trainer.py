"""create_rl_trainer, callbacks and the trainer's own promises, up to the driver's door."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_ray import (
    Callback,
    FluxConfig,
    FluxTrainer,
    TrainingResult,
    UserError,
    create_rl_trainer,
    create_sft_trainer,
)
from flux_ray.observability.callbacks import as_callback

pytestmark = pytest.mark.unit


def make(**given):
    return create_rl_trainer(**{"model_name": "m", "dataset_name": "d.jsonl", **given})


def test_names_options_and_the_preset_become_one_config():
    trainer = make(algorithm="dapo", num_generations=8, num_steps=5, rewards=["numeric", "length"])
    config = trainer.config
    assert (config.model.path, config.data.train, config.rollout.group_size) == ("m", "d.jsonl", 8)
    assert config.algo.clip_range_high == 0.28 and config.filter.reward == "task" and config.driver.num_steps == 5
    assert config.reward.functions == ["numeric", "length"] and trainer.backend == "ray"


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dapo", "drgrpo", "dpo"])
@pytest.mark.parametrize("backend", ["ray", "trl"])
def test_what_is_promised_by_name(algorithm, backend):
    assert make(algorithm=algorithm, backend=backend).backend == backend


def test_ppo_with_a_reward_model():
    trainer = make(algorithm="ppo", reward_model_name="org/judge")
    assert trainer.config.algo.name == "ppo" and trainer.config.reward.functions == ["model:org/judge"]
    assert (trainer.config.algo.kl_coef, trainer.config.algo.beta) == (0.05, 0.0)
    beside = make(algorithm="ppo", reward_model_name="org/judge", rewards="length", **{"reward.weights": [0.1, 1.0]})
    assert beside.config.reward.functions == ["length", "model:org/judge"]
    named = make(algorithm="grpo", reward_model_name="r", **{"reward.functions": ["model:r", "numeric"]})
    assert named.config.reward.functions == ["model:r", "numeric"]


@pytest.mark.parametrize(("given", "message"), [
    ({"algorithm": "ppo", "backend": "trl"}, "backend=trl has no ppo: it has no critic; use backend=ray"),
    ({"algorithm": "ppo", "backend": "unsloth", "reward_model_name": "r"}, "backend=unsloth has no ppo"),
    ({"algorithm": "gspo", "backend": "unsloth"}, "backend=unsloth has no gspo"),
    ({"backend": "trl", "reward_model_name": "r"}, "backend=trl has no reward models"),
    ({"backend": "trl", "reward.functions": ["model:r"]}, "reward.functions has model:r: our reward models"),
    ({"reward_model_name": "r", "reward.functions": ["model:other"]}, "'r' and reward.functions' 'model:other'"),
    ({"algorithm": "dpo", "reward_model_name": "r"}, "algorithm 'dpo' scores nothing"),
    ({"algorithm": "grop"}, "unknown algorithm 'grop': did you mean 'grpo'"),
    ({"backend": "try"}, "unknown backend 'try'"),
    ({"backend": "trl", "algorithm": "cdpo"}, "backend=trl: unknown algorithm 'cdpo': did you mean 'dpo'"),
    ({"backend": "trl", "algorithm": "dpo", "reference_free": True}, "algo.reference_free=True isn't there"),
    ({"backend": "trl", "algorithm": "ipo", "pair_logprobs": "sum"}, "algo.pair_logprobs=sum isn't there"),
    ({"backend": "trl", "algorithm": "gspo_token"}, "backend=trl: unknown algorithm 'gspo_token'"),
    ({"backend": "trl", "max_staleness": 2}, "driver.max_staleness=2 isn't there"),
    ({"grop_size": 2}, "did you mean 'rollout.group_size'"),
])
def test_refused_when_it_is_created(given, message):
    with pytest.raises(UserError) as caught:
        make(**given)
    assert message in str(caught.value)


def test_a_function_is_a_callback_and_other_things_are_not():
    seen = []
    as_callback(lambda step, metrics: seen.append((step, metrics))).on_step(3, {"a": 1.0})
    assert seen == [(3, {"a": 1.0})]
    own = Callback()
    assert as_callback(own) is own
    for wrong in ("print", None, Callback):
        with pytest.raises(UserError, match="neither a Callback nor a function"):
            as_callback(wrong)


def test_wrong_callbacks_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a Callback"):
        FluxTrainer(FluxConfig(model_path="m")).add_callback(3)   # type: ignore[arg-type]
    with pytest.raises(UserError, match="neither a Callback"):
        FluxTrainer(FluxConfig(model_path="m")).fit("d.jsonl", callbacks=[3])   # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_after_its_block_a_trainer_is_done():
    nothing_given = pytest.raises(UserError, match=r"no prompts given, and eval\.data names none")
    with FluxTrainer(FluxConfig(model_path="m")) as trainer, nothing_given:
        trainer.evaluate()
    for call in (trainer.fit, trainer.evaluate):
        with pytest.raises(UserError, match="block has ended"):
            call()


def test_an_sft_trainer_and_a_backend_that_is_chosen_for_one():
    trainer = create_sft_trainer(model_name="m", dataset_name="d.jsonl", backend="auto", learning_rate=1e-5)
    assert (trainer.config.algo.name, trainer.config.train.learning_rate, trainer.backend) == ("sft", 1e-5, "ray")
    assert make(algorithm="ppo", backend="auto", reward_model_name="r").backend == "ray"
    with pytest.raises(UserError, match=r"FluxConfig\.from_yaml"):
        make(config="mine.yaml")


STEPS = ({"reward/mean": 0.25, "actor/loss": 3.0, "rollout/tokens": 10.0, "driver/step_s": 1.5},
         {"reward/mean": 0.5, "actor/loss": 2.0, "rollout/tokens": 12.0, "driver/step_s": 0.5})


def test_a_result_by_the_names_that_other_projects_have(tmp_path):
    result = TrainingResult(tmp_path, 7, STEPS[-1], STEPS)
    assert (result.final_reward, result.reward_history) == (0.5, [0.25, 0.5])
    assert (result.final_loss, result.loss_history) == (2.0, [3.0, 2.0])
    assert (result.total_steps, result.total_tokens, result.total_time_seconds) == (7, 22, 2.0)
    assert result.checkpoint_path is None
    for step in (9, 10):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000009/driver.json").write_text("{}")   # the tenth isn't whole
    assert result.checkpoint_path == (tmp_path / "checkpoints/step-000009").resolve()
    pairs = TrainingResult(tmp_path, 1, {"train/loss": 0.7}, ({"train/loss": 0.7},))
    assert pairs.final_loss == 0.7 and not hasattr(pairs, "final_reward")
    with pytest.raises(AttributeError, match=r"batch\.prompts_per_step x rollout\.group_size samples"):
        _ = result.total_samples


def test_a_trainer_says_what_there_is_instead_of_a_method(tmp_path):
    trainer = make()
    with pytest.raises(AttributeError, match="FluxTrainer has no predict: vLLM or transformers generates"):
        trainer.predict("a")
    with pytest.raises(AttributeError, match="push_to_hub: nothing is uploaded: `hf upload"):
        trainer.push_to_hub("a/b")
    assert not hasattr(trainer, "no_such_thing")
    with pytest.raises(UserError, match="nothing was trained yet"):
        trainer.save_model(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    trainer._result = TrainingResult(tmp_path / "run", 1)
    assert trainer.save_model(tmp_path / "copy") == Path(tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="copy isn't empty"):
        trainer.save_model(tmp_path / "copy")
