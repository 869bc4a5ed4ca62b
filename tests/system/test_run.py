"""The whole loop: trainer and engines agree after every update; a run's folder; stopped and resumed; the same again."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.cluster.plan import ENGINE
from flux_ray.config import from_dict, to_dict
from flux_ray.errors import RunFailed
from tests.system.program import REPO, Program, actor_of, metrics, numbers
from tests.system.small_run import NUM_STEPS, assert_agreement, options

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

CHECKPOINT_AT = 4
SECONDS = ("driver/step_s", "driver/wait_s", "train/step_s", "weights/publish_s", "rollout/s", "rollout/tokens_per_s")
#: What every line of a policy run has beside the seconds.
NAMES = (
    "step", "actor/clip_frac", "actor/entropy", "actor/adv_mean", "actor/adv_std", "actor/ratio_mean", "actor/loss",
    "reward/mean", "reward/std", "rollout/response_length_mean", "rollout/response_length_max",
    "rollout/truncated_frac", "rollout/tokens", "driver/version", "driver/groups_dropped", "train/grad_norm",
    "weights/logprob_gap_mean", "weights/logprob_gap_max",
)


def test_engines_and_trainer_agree_after_every_update(whole, toys):
    assert_agreement(whole, toys.tied)


def test_the_run_folder(whole):
    import yaml

    values = yaml.safe_load((whole / "config.yaml").read_text())
    config = from_dict(values)
    assert to_dict(config) == values and config.run_dir == str(whole) and config.train.num_ranks == 2
    for line in metrics(whole):
        assert set(NAMES) | set(SECONDS) <= set(line), set(NAMES) - set(line)
        assert all(line[name] > 0 for name in SECONDS) and line["driver/version"] == line["step"] + 1
        assert line["actor/ratio_mean"] == pytest.approx(1.0) and line["actor/clip_frac"] == 0.0
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [step for step in range(NUM_STEPS) for _ in range(2)]
    for sample in samples:
        assert sample["prompt"].endswith("=")
        assert sample["reward"] == pytest.approx(sum(c.isdigit() for c in sample["completion"]) / 16)
    assert "step 12/12" in (whole / "run.log").read_text()
    logs = {f"{role}-{i}.log" for role, count in (("engine", 2), ("trainer", 2), ("reward", 1)) for i in range(count)}
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert "the run is done" in report and "reward/mean by step" in report and "vllm" in report
    assert logs <= {path.name for path in (whole / "logs").iterdir()}


def test_the_model_is_one_that_transformers_loads(whole, toys):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    saved = load_file(whole / "model" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert tokenizer.decode(tokenizer("1+2=")["input_ids"]) == "1+2="
    eos = GenerationConfig.from_pretrained(whole / "model").eos_token_id
    assert eos == GenerationConfig.from_pretrained(toys.tied).eos_token_id == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def interrupted(toys, whole, tmp_path_factory):
    """The same run from the command line, on one engine instead of two, ended by Ctrl-C after its first checkpoint.

    Its tests repeat, on one run, what test_engine_is_replaced, test_run_with_lora and tests/faults show apart.
    """
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    values = {**options(toys, toys.tied), "data.train": toys.data, "run_dir": run_dir,
              "checkpoint.every": CHECKPOINT_AT, "checkpoint.on_stop": False, "driver.num_steps": 10_000,
              # An engine core of its own, as on GPUs.
              "cluster.env.VLLM_ENABLE_V1_MULTIPROCESSING": "'1'"}
    arguments = [f"{key}={value}" for key, value in values.items()]
    program = Program(arguments, folder=run_dir.parent)
    try:
        program.wait_for_steps(CHECKPOINT_AT + 2, run_dir=run_dir)
        program.interrupt()
        code = program.end(deadline_s=30)
        yield run_dir, code, program.shown
    finally:
        program.end_all()


@pytest.mark.all
def test_ctrl_c_ends_all_processes_calmly(interrupted):
    _, code, shown = interrupted
    assert code == 130 and shown.splitlines()[-1].startswith("flux-ray: interrupted: step ")
    assert "Traceback" not in shown and "Error" not in shown


@pytest.mark.all
def test_the_same_seed_is_the_same_run_on_fewer_engines(interrupted, whole):
    steps = metrics(interrupted[0])[:CHECKPOINT_AT]
    assert len(steps) == CHECKPOINT_AT and numbers(steps) == numbers(metrics(whole)[:CHECKPOINT_AT])


@pytest.mark.all
def test_resumed_it_goes_on_as_if_nothing_had_happened_and_a_dead_engine_may_end_it(interrupted, whole, kept):
    """From its checkpoint; then the engine's own child process is killed: the run says so and ends."""
    run_dir, *_ = interrupted

    def on_step(step, _):
        if step + 1 == NUM_STEPS:
            engine = actor_of(run_dir / "logs" / "engine-0.log")
            (core,) = [child for child in engine.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
            core.send_signal(signal.SIGKILL)

    with kept(anew=[ENGINE]), pytest.raises(RunFailed, match=r"^engine 0"):
        values = {"num_steps": 10_000, "cluster.max_restarts": 0}
        FluxTrainer(FluxConfig(resume=str(run_dir), **values)).fit(callbacks=[on_step])
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(len(lines))), "each step once"
    assert numbers(lines[:NUM_STEPS]) == numbers(metrics(whole))


def test_a_reward_that_raises_ends_the_run_naming_function_and_sample(kept, toys, tmp_path):
    """The rollout is the example of the documentation, with two turns; its third step's reward breaks."""
    values = {**options(toys, toys.tied), "data.shuffle": False, "reward.functions": [f"{toys.rewards}:breaks"],
              "rollout.function": f"{REPO}/examples/calculator.py:with_calculator",
              "run_dir": str(tmp_path / "run")}
    with kept(), pytest.raises(RunFailed) as failed:
        FluxTrainer(FluxConfig(algorithm="grpo", **values)).fit(str(toys.data))
    assert str(failed.value).startswith(
        "reward 0, score of prompt row 18 (from 1): RewardError: reward breaks, prompt row 18 (from 1), sample 1 of 4: "
        "KeyError: 'no such thing'")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert not (tmp_path / "run" / "model").exists()


def test_a_troubled_reward_is_dropped_and_counted_and_agreement_holds(kept, toys, tmp_path):
    """Temperature 0.7. Rewards raise and hang, end the process that they run in, block it with the interpreter's lock
    held, each at a step of its own: dropped groups, and the run goes on.
    """
    values = {**options(toys, toys.tied), "rollout.temperature": 0.7, "data.shuffle": False,
              "reward.functions": [f"{toys.rewards}:troubled"], "reward.on_failure": "drop", "reward.deadline_s": 2.0}
    with kept():
        result = FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(tmp_path / "run"))).fit(str(toys.data))
    assert_agreement(result.run_dir, toys.tied)
    dropped = [line["driver/groups_dropped"] for line in metrics(result.run_dir)]
    assert dropped[:2] == [0, 0] and all(dropped[step] > dropped[step - 1] for step in (2, 4, 6)), dropped
    log = (result.run_dir / "run.log").read_text()
    for cause in ("KeyError: 'no such thing'", "no value within reward.deadline_s=2",
                  "the process in which it ran exited with 3"):
        assert cause in log, f"{cause} is not in\n{log}"
