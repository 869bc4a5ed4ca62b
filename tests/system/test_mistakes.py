"""What a run finds wrong before an actor starts: one readable line, nothing made."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.__main__ import main
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.run.prepare import prepare
from flux_ray.run_dir import LOCK
from tests.families import make_family
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True, context=64)


@pytest.fixture
def refused(model, tmp_path, monkeypatch, capfd):
    """A right configuration and then the given words, as on a command line; gives the one line that refuses it.

    From Python: how the command line composes its words, which takes most of a second, has tests of its own.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "1"}) + "\n"
                                                 for i in range(8)))
    right = {"model.path": str(model), "data.train": "data.jsonl", "run_dir": "run", "rollout.max_tokens": 16,
             "cluster.address": "127.0.0.1:1"}  # a mistake that isn't seen must not start a run

    def files() -> list:
        """But for the lock by which a folder is looked at."""
        return sorted(path for path in tmp_path.rglob("*")
                      if path.name not in ("__pycache__", LOCK) and path.suffix != ".pyc")

    def refuse(*words: str) -> str:
        before = files()
        given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
        with pytest.raises(UserError) as refusal:
            FluxTrainer(FluxConfig(**right | given)).fit()
        assert capfd.readouterr() == ("", "") and "\n" not in str(refusal.value)
        assert files() == before, "a run was started"
        ray = sys.modules.get("ray")
        assert ray is None or not ray.is_initialized()
        return str(refusal.value)

    return refuse


@pytest.mark.parametrize("words, message", [
    (["rollout.grop_size=2"], "unknown option 'rollout.grop_size': did you mean 'rollout.group_size'?"),
    (["rollout.group_size=1"], "rollout.group_size must be >= 2 for grpo, got 1"),
    (["batch.prompts_per_step=6", "algo.mini_batches=4"],
     "batch.prompts_per_step=6 must be divisible by algo.mini_batches=4"),
    (["batch.prompts_per_step=8", "train.num_ranks=3"], "must be divisible by train.num_ranks=3"),
    (["model.path=/no/such/model"], "/no/such/model"),
    (["train.lora.rank=4", "train.lora.targets=[q_proj,lm_hed]"], "'lm_hed' (known: all-linear, down_proj, gate_proj"),
    (["train.lora.rank=4", "train.lora.targets=[lm_head]"], "'lm_head' is lm_head (the model's head): linear layers"),
    (["rollout.max_model_len=4096"], "rollout.max_model_len=4096 is more than the 64 positions of model.path="),
    (["data.train=no_such.jsonl"], "no_such.jsonl: no such file"),
    (["data.prompt_column=promt"], "data.jsonl: unknown column 'promt': did you mean 'prompt'?"),
    (["rollout.max_tokens=62"], "data.jsonl row 1 (from 1): column 'prompt': 4 tokens, more than the 2 that"),
    (["rollout.max_tokens=64"], "rollout.max_tokens=64 leaves no room for a prompt in a context of 64 tokens"),
    (["reward.functions=[no_such.py:f]"], "no_such.py"),
    (["reward.functions=[numerci]"], "'numerci'"),
    (["algo=ppo", "reward.functions=['model:/no/such']"],
     "reward.functions, model:/no/such: model '/no/such': no such folder"),
    (["algo=ppo", "reward.functions=['model:']"], "reward.functions: 'model:' names no reward model: model:PATH does"),
    (["algo=ppo", "critic.path=/no/such"], "model '/no/such': no such folder"),
    (["critic.warmup_steps=2"], "critic.warmup_steps=2 is read by ppo alone, not by grpo"),
    (["algo.gae_lambda=0.5"], "algo.gae_lambda=0.5 is read by ppo alone, not by grpo"),
    (["rollout.engine_args.dtype=half"], "rollout.engine_args.dtype can't be set there: model.dtype"),
    (["rollout.engine_args.pipeline_parallel_size=2"], "one engine is one tensor-parallel group: rollout.num_engines"),
    (["rollout.engine_args.data_parallel_size=2"], "one engine is one tensor-parallel group: rollout.num_engines"),
    (["eval.temperature=0", "eval.num_samples=4"], "eval.num_samples=4 needs eval.temperature > 0"),
    (["algo.beta=0.01", "reference.path=/no/such/model"], "model '/no/such/model': no such folder"),
    (["algo.beta=0.01", "reference.path=/no/such/model", "rollout.max_model_len=64"],
     "model '/no/such/model': no such folder"),
    (["train.deepspeed.zero_optimization.stage=2"], "train.zero_stage"),
    (["rollout.kv_cache_gib=1e-6", "cluster.device=cpu", "cluster.address=null"],
     "rollout.kv_cache_gib=1e-06 is less than one sequence takes"),
    (["algo.router_replay=true"], "algo.router_replay=true: the model (qwen3) has no routers: leave the option out"),
    (["rollout.return_experts=true"], "rollout.return_experts=true: the model (qwen3) has no routers"),
    (["algo.router_replay=true", "rollout.engine_args.enable_prefix_caching=false"],
     "algo.router_replay=true with rollout.engine_args.enable_prefix_caching=False: vLLM doesn't give the experts"),
    (["rollout.engine_args.enable_return_routed_experts=true"],
     "rollout.engine_args.enable_return_routed_experts can't be set there: rollout.return_experts"),
    (["rollout.function=no_such.py:f"], "no_such.py"),
    (["rollout.function=singel_turn"], "did you mean 'single_turn'?"),
    (["plugins=[no_such.py]"], "plugins: there is no file"),
    (["resume=no/such/run"], "resume=no/such/run: there is no"),
    (["weights.backend=nccl", "cluster.device=cpu", "cluster.address=null"], "weights.backend=nccl can't work on CPU"),
])
def test_a_mistake_in_the_options(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize("name, message", [
    ("DeepSeek-V3", "(deepseek_v3) has latent attention (MLA): vLLM's engine on CPU gives queries other rotary "
     "positions than the trainer, and log-probs are off by nats; one on a GPU may not (cluster.device=cuda), and what "
     "needs no engine trains it (algo=sft, algo=dpo). weights.allow_logprob_gap=true trains all the same"),
    ("gpt-oss", "(gpt_oss) can't take new weights: its loader copies its experts and its attention sinks past vLLM's "
     "own reload, so that they would stay as they were, on CPU and GPU alike; what needs no engine trains it"),
])
def test_a_mixture_that_engines_do_not_serve_right(refused, tmp_path_factory, name, message):
    """A Ray of the run's own would start next."""
    folder = make_family(name, tmp_path_factory.mktemp("mixture"))
    assert message in refused(f"model.path={folder}", "cluster.address=null", "cluster.device=cpu")


def test_on_the_command_line_it_is_one_line_and_an_exit_code(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    assert main(["train", "model.path=/no/such/model", "data.train=data.jsonl", "run_dir=run"]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.startswith("flux-ray: ") and shown.err.count("\n") == 1, shown
    assert "/no/such/model" in shown.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, message", [
    ("", "bad.jsonl: no rows in it"),
    ('{"prompt": "1+1="}\n{"prompt": \n', "bad.jsonl line 2: broken JSON: "),
    ('{"prompt": "1+1="}\n{"prompt": 7}\n', "bad.jsonl row 2 (from 1): column 'prompt': must be text"),
    ('{"prompt": "1+1="}\n\n\n{"prompt": 7}\n', "bad.jsonl row 4 (from 1): column 'prompt': must be text"),
    ('{"prompt": "1+1="}\n[1]\n', "bad.jsonl line 2: list, not a JSON object"),
])
def test_a_mistake_in_the_data(refused, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    assert message in refused("data.train=bad.jsonl", "reward.functions=[length]")


@pytest.mark.parametrize("answers, found", [(["a", "b"], "no row, e.g. 'a'"), (["1", "b", None], "1 rows of 3")])
def test_answers_that_a_rule_cannot_read(refused, model, tmp_path, answers, found):
    """Of no row: refused. Of some: a warning."""
    rows = [json.dumps({"prompt": f"{i}+1=", "answer": answer}) + "\n" for i, answer in enumerate(answers)]
    (tmp_path / "words.jsonl").write_text("".join(rows))
    expected = f"words.jsonl: reward numeric can use the 'answer' of {found}"
    if "1" in answers:
        given = {"model.path": str(model), "data.train": "words.jsonl", "reward.functions": ["numeric"],
                 "rollout.max_tokens": 16}
        assert any(expected in warning for warning in prepare(from_dict(given)).warnings)
    else:
        assert expected in refused("data.train=words.jsonl", "reward.functions=[numeric]")


def test_data_without_an_answer_need_a_reward(refused, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1="}\n')
    assert "reward.functions" in refused("data.train=bare.jsonl")


def test_a_reward_that_cannot_be_imported(refused, tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package\n\ndef f(completions, **columns): ...\n")
    message = refused("reward.functions=[mine.py:f]")
    assert "mine.py line 1 failed: ModuleNotFoundError: No module named 'no_such_package'" in message
    (tmp_path / "other.py").write_text("def good(completions, **columns): ...\n")
    assert "did you mean 'good'?" in refused("reward.functions=[other.py:goood]")


def test_a_folder_that_holds_a_run(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    message = refused("run_dir=run")
    assert message.startswith(f"run_dir={tmp_path}/run holds a run already") and "resume=" in message


def test_an_engine_argument_that_vllm_does_not_have(refused):
    pytest.importorskip("vllm.version")
    message = refused("rollout.engine_args.enforce_eagr=true")
    assert message == ("unknown option 'rollout.engine_args.enforce_eagr': "
                       "did you mean 'rollout.engine_args.enforce_eager'?")
    assert "vLLM has no such option" in refused("rollout.engine_args.zzzzzz=1")


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_a_model_folder_without_weights(refused, model, tmp_path, key):
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused("algo.beta=0.01", f"{key}=bare")
    assert message.startswith(f"{key}={tmp_path}/bare: the folder holds no weights")


def test_local_paths_are_absolute_and_hub_names_stay(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model, tmp_path / "m")
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1+1=", "answer": "2"}\n')
    given = {"model.path": "m", "model.tokenizer": "~/m", "algo.beta": 0.01, "reference.path": "m",
             "data.train": "~/train.jsonl", "eval.data": "eval.jsonl", "rollout.max_tokens": 16,
             "rollout.engine_args": {"enforce_eager": True}}
    config = prepare(from_dict(given)).config
    assert config.model.path == config.model.tokenizer == config.reference.path == str(tmp_path / "m")
    assert config.data.train == str(tmp_path / "train.jsonl") and config.eval.data == str(tmp_path / "eval.jsonl")
    unused = prepare(from_dict({**given, "algo.beta": 0.0, "reference.path": "someone/some-model"})).config
    assert unused.reference.path == "someone/some-model"


@pytest.mark.parametrize("words", [
    ["model.path={caps}"], ["algo.beta=0.01", "reference.path={caps}"],
    ["algo=ppo", "critic.path={caps}"], ["reward.functions=['model:{caps}']"]])
def test_a_model_that_computes_what_we_dont_in_any_place(refused, tmp_path, words):
    folder = make_family("Gemma 2", tmp_path / "gemma2")
    if "reward" in words[-1]:
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["ForSequenceClassification"], "id2label": {"0": "score"}}
        (folder / "config.json").write_text(json.dumps(config))
    said = refused(*(word.format(caps=folder) for word in words), "model.attention=sdpa")
    assert "a cap on its attention's scores, which this attention passes over" in said


def test_ppo_wants_a_reward_model_that_is_one_and_a_critic_that_reads_its_tokens(refused, model, tmp_path):
    said = refused("algo=ppo", f"reward.functions=['model:{model}']")
    assert said.endswith("is no sequence classification model (architectures: Qwen3ForCausalLM)")
    other = tiny_model(tmp_path / "other", tied=True, context=64, vocab=40)
    assert "its tokenizer isn't the policy's" in refused("algo=ppo", f"critic.path={other}")
    short = tiny_model(tmp_path / "short", tied=True, context=16)
    said = refused("algo=ppo", f"critic.path={short}")
    assert "its context is 16 tokens, prompts and responses have up to 20" in said
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1="}\n' * 8)
    assert refused("algo=ppo", "data.train=bare.jsonl").startswith("no reward: reward.functions is empty")
    groups = {"prompt": "1+1=", "responses": ["2", "3"], "rewards": [1.0, 0.0]}
    (tmp_path / "groups.jsonl").write_text((json.dumps(groups) + "\n") * 8)
    assert "groups.jsonl holds groups with rewards: ppo learns from" in refused("algo=ppo", "data.train=groups.jsonl")
