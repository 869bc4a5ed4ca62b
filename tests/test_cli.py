"""`flux-ray train`: Hydra's own command line, errors in one line, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import flux_ray
from flux_ray import __main__ as cli
from flux_ray import config as configs
from flux_ray import help as helps
from flux_ray.config import Config

pytestmark = pytest.mark.unit

REPO = Path(__file__).parents[1]
READY = ["model.path=m", "data.train=d.jsonl"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*overrides: str) -> list[Config]:
    configs_: list[Config] = []
    cli.compose(list(overrides), then=configs_.append)
    return configs_


def printed(capsys, *arguments: str) -> dict:
    assert cli.main(["train", *arguments, "--cfg", "job"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert cli.main(["train", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("flux-ray: ") and shown.err.count("\n") == 1
    return shown.err.removeprefix("flux-ray: ").strip()


def test_defaults_are_config_py_s(elsewhere):
    assert composed(*READY) == [configs.from_dict({"model.path": "m", "data.train": "d.jsonl"})]
    assert list(elsewhere.iterdir()) == []


def test_groups_and_overrides():
    (config,) = composed(*READY, "algo=dr_grpo", "experiment=addition", "rollout.max_tokens=9", "cluster=one_gpu")
    assert config.algo.name == "dr_grpo" and not config.algo.normalize_by_std
    assert config.reward.functions == ["exact_match"] and config.rollout.max_tokens == 9 and config.cluster.colocate


def test_an_experiment_chooses_its_algorithm_and_has_the_last_word():
    (config,) = composed(*READY, "experiment=addition_sft")
    values = yaml.safe_load((REPO / "conf" / "experiment" / "addition_sft.yaml").read_text())
    assert config.algo.name == "sft" and isinstance(config, configs.SFTConfig)
    assert config.train.learning_rate == values["train"]["learning_rate"]


def test_plus_and_tilde():
    arguments = ["rollout.engine_args.a=1", "+rollout.engine_args.b=2", "experiment=addition", "~experiment"]
    (config,) = composed(*READY, *arguments)
    assert config.rollout.engine_args == {"a": 1, "b": 2} and config.rollout.group_size == 4


def test_names_people_bring():
    (config,) = composed(*READY, "algorithm=drgrpo", "num_generations=16", "epsilon=0.3", "algo.kl_loss_coef=0.5")
    assert (config.algo.name, config.rollout.group_size) == ("dr_grpo", 16)
    assert (config.algo.clip_range, config.algo.beta) == (0.3, 0.5)


def test_an_algorithm_by_its_option_brings_its_preset():
    (config,) = composed(*READY, "algo.name=dapo")
    assert (config.algo.name, config.algo.clip_range_high) == ("dapo", 0.28)
    for arguments in (["algo.name=of_a_plugin"], ["algo=dapo", "algo.name=of_a_plugin"]):
        (config,) = composed(*READY, *arguments)
        assert config.algo.name == "of_a_plugin"
    (config,) = composed(*READY, "algo=dapo", "algo.name=grpo")   # the group was chosen: the name alone
    assert (config.algo.name, config.algo.clip_range_high) == ("grpo", 0.28)


def test_the_last_of_one_name_wins_but_two_names_may_not_disagree(capsys):
    (config,) = composed(*READY, "rollout.group_size=2", "rollout.group_size=6")
    assert config.rollout.group_size == 6
    message = refusal(capsys, "n=2", "rollout.group_size=6")
    assert message == "rollout.group_size: n=2 and rollout.group_size=6; give one of them"
    assert refusal(capsys, "algo=cispo", "epsilon_high=5").startswith("epsilon_high: for cispo some libraries mean")


def test_values_with_spaces_and_braces():
    (config,) = composed(*READY, "data.prompt_template='Q: {prompt} = '", "reward.functions=[numeric,a/b.py:f]")
    assert config.data.prompt_template == "Q: {prompt} = " and config.reward.functions == ["numeric", "a/b.py:f"]


def test_cfg_job_prints_the_whole_config(capsys):
    values = printed(capsys, "experiment=gsm8k", "n=4")
    assert values["rollout"]["group_size"] == 4 and set(values) == set(configs.to_dict(configs.PolicyGradientConfig()))


def test_cfg_job_prints_what_an_objective_reads_and_refuses_what_a_run_would(capsys):
    values = printed(capsys, "algo=dpo", "algo.beta=0.3")
    assert values["algo"] == {"name": "dpo", "beta": 0.3, "reference_free": False} and "reward" not in values
    assert cli.main(["train", "algo=sft", "rollout.n=4", "--cfg", "job"]) == 2
    assert "rollout.group_size=4 is read by grpo and its kin, ppo alone, not by sft" in capsys.readouterr().err
    assert cli.main(["train", "rollout.group_size=0", "--cfg=job"]) == 2
    assert "rollout.group_size must be >= 1, got 0" in capsys.readouterr().err


def test_an_option_may_be_another_s(capsys):
    assert printed(capsys, "train.num_ranks=2", "batch.prompts_per_step=${rollout.group_size}")["batch"][
        "prompts_per_step"] == 4


def test_a_run_of_an_older_version_goes_on(elsewhere, capsys):
    """It saved every option there was."""
    (elsewhere / "run").mkdir()
    saved = {"algo": {"name": "sft", "beta": 0.0, "gamma": 1.0}, "rollout": {"max_tokens": 256, "max_model_len": 64}}
    (elsewhere / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    values = printed(capsys, "resume=run", "driver.num_steps=7")
    assert values["algo"] == {"name": "sft"} and values["rollout"] == {"max_model_len": 64}
    assert values["driver"] == {"num_steps": 7} and values["resume"] == "run"


def test_a_folder_of_the_users_own(elsewhere):
    (elsewhere / "mine" / "experiment").mkdir(parents=True)
    (elsewhere / "mine" / "experiment" / "first.yaml").write_text(
        "# @package _global_\nmodel: {path: m}\ndata: {train: d.jsonl}\nseed: 5\n")
    (config,) = composed("--config-dir", "mine", "experiment=first")
    assert config.seed == 5
    (config,) = composed("--config-dir", "mine", "experiment=first", "seed=6", "algo=dapo")
    assert config.seed == 6 and config.algo.clip_range_high == 0.28


def test_hydra_s_folder_may_be_the_present_one_and_its_file_without_a_first_line(elsewhere):
    """Without `# @package _global_` Hydra would put the file's options under `experiment`."""
    (elsewhere / "experiment").mkdir()
    (elsewhere / "experiment" / "plain.yaml").write_text("model: {path: m}\ndata: {train: d.jsonl}\nseed: 5\n")
    for where in (["--config-dir", "."], ["--config-dir=."], ["-cd", "."]):
        (config,) = composed(*where, "experiment=plain", "algo=dapo")
        assert (config.seed, config.model.path, config.algo.clip_range_high) == (5, "m", 0.28)
    first, second = composed("--multirun", "--config-dir", ".", "experiment=plain,addition", *READY)
    assert (first.seed, first.rollout.group_size, second.reward.functions) == (5, 4, ["exact_match"])


def test_an_unknown_key_in_the_users_own_file(elsewhere, capsys):
    (elsewhere / "mine" / "experiment").mkdir(parents=True)
    (elsewhere / "mine" / "experiment" / "first.yaml").write_text("# @package _global_\nrollout: {grop_size: 3}\n")
    message = refusal(capsys, "--config-dir", "mine", "experiment=first")
    assert message == "experiment/first.yaml: unknown option 'rollout.grop_size': did you mean 'rollout.group_size'?"


def test_multirun_gives_each_job_a_folder(elsewhere):
    first, second = composed("--multirun", *READY, "seed=0,1")
    assert (first.seed, second.seed) == (0, 1)
    assert first.run_dir and second.run_dir and first.run_dir != second.run_dir
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]


@pytest.mark.parametrize("arguments, message", [
    (["rollout.grop_size=3"], "unknown option 'rollout.grop_size': did you mean 'rollout.group_size'?"),
    (["grop_size=3"], "unknown option 'grop_size': did you mean 'rollout.group_size'?"),
    (["+rollout.grop_size=3"], "unknown option 'rollout.grop_size': did you mean 'rollout.group_size'?"),
    (["rolout.deadline_s=3"], "unknown option 'rolout.deadline_s': did you mean 'rollout.deadline_s'?"),
    (["rollout.group_size=many"], "rollout.group_size: Value 'many' of type 'str' could not be converted to Integer"),
    (["algo=grop"], "unknown algo 'grop': did you mean 'grpo'?"),
    (["experiment=adition"], "unknown experiment 'adition': did you mean 'addition'?"),
    (["rollout.group_size"], "'rollout.group_size' is no override"),
    (["~reward.weights"], "reward.weights: an option can't be taken away"),
    (["--config-dir", "nowhere"], "nowhere' not found"),
    (["model.path=${oc.env:SURELY_UNSET}", "data.train=d"], "model.path: "),
    ([], "model.path is missing"),
    ([*READY, "algo.off_policy=tos"], "algo.off_policy must be one of none, tis, icepop; got 'tos'"),
])
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


def test_unknown_verb(capsys):
    assert cli.main(["tran"]) == 2
    known = ", ".join(sorted([*cli.COMPOSING, *cli.COMMANDS]))
    assert capsys.readouterr().err == f"flux-ray: unknown verb 'tran': did you mean 'train'? (known: {known})\n"


def test_help_has_every_option_with_its_meaning(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    text = " ".join(shown.split())
    for key, f in configs.options():
        assert f" {key}=" in text and " ".join(f.metadata["help"].split()) in text
    assert "experiment: addition, addition_ppo," in text
    assert max(map(len, shown.splitlines())) <= helps.COLUMNS
    assert " algo.beta=0.01 " in text and "dpo, ipo, cdpo: 0.1, scale of the implicit reward" in text
    assert " critic.path=null where it starts: a policy or a reward model; none: the policy's own start (ppo)" in text
    assert cli.main([]) == 0 and "flux-ray train" in capsys.readouterr().out


def test_a_line_of_explain_is_wrapped_for_a_terminal_alone(monkeypatch):
    line = "weight w     " + "the mean over all loss tokens of the update, and so on " * 3
    assert helps.paragraph(line, indent=13) == line
    monkeypatch.setattr(helps.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    first, *rest = helps.paragraph(line, indent=13).splitlines()
    assert len(rest) > 1 and all(len(part) <= 60 for part in (first, *rest))
    assert all(part.startswith(" " * 13) for part in rest)
    assert " ".join([first, *(part.strip() for part in rest)]) == line.strip()


def test_as_a_program_from_another_folder(elsewhere):
    command = [sys.executable, "-m", "flux_ray", "train"]
    environment = {"PYTHONPATH": str(REPO), "PATH": ""}
    done = subprocess.run([*command, "grop_size=3"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flux-ray: unknown option 'grop_size': did you mean 'rollout.group_size'?\n"
    done = subprocess.run([*command, "--cfg", "job"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["rollout"]["group_size"] == 4
    assert list(elsewhere.iterdir()) == []


def test_what_the_run_finds_wrong_is_one_line_too(elsewhere, capsys):
    message = refusal(capsys, "model.path=no/such/model", "data.train=no_such.jsonl", "cluster.device=cpu")
    assert "no/such/model" in message or "no_such.jsonl" in message
    assert list(elsewhere.iterdir()) == []


def test_the_wheel_holds_conf(elsewhere):
    pytest.importorskip("setuptools", minversion="77")
    source = elsewhere / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((REPO / name).read_bytes())
    shutil.copytree(REPO / "flux_ray", source / "flux_ray", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "conf", source / "conf")
    code = "import os, setuptools.build_meta as b; print(b.build_wheel(os.environ['OUT']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env={"OUT": str(elsewhere), "PATH": ""},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = elsewhere.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"flux_ray/conf/{path.relative_to(REPO / 'conf')}" for path in (REPO / "conf").rglob("*.yaml")}
    assert conf <= inside and "flux_ray/py.typed" in inside
    assert not [name for name in inside if name.startswith(("tests", "conf", "launch"))]


PLUGIN = """
from flux_ray import register_policy_loss

@register_policy_loss("from_a_plugin")
def loss(old_log_prob, log_prob, advantages, response_mask, **kw):
    return -log_prob * advantages, {}
"""


def test_explain_prints_the_objective_and_starts_nothing(elsewhere, capsys):
    assert cli.main(["explain", "algorithm=gspo", "epsilon=0.2", "n=8"]) == 0
    shown = capsys.readouterr().out
    assert "−min(s·A, clip(s, 1 − 0.2, 1 + 0.0004)·A)" in shown and "× 8 samples" in shown
    assert "warning: algo.clip_range=0.2 with gspo" in shown
    assert list(elsewhere.iterdir()) == []


def test_explain_knows_what_a_plugin_registers_and_refuses_what_train_refuses(elsewhere, capsys):
    (elsewhere / "mine.py").write_text(PLUGIN)
    assert cli.main(["explain", "plugins=[mine.py]", "algo.policy_loss=from_a_plugin"]) == 0
    assert "what the registered loss from_a_plugin gives" in capsys.readouterr().out
    assert cli.main(["explain", "rollout.group_size=1"]) == 2
    assert "rollout.group_size must be >= 2 for grpo, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", [
    "/data/runs/lr=1e-5/model", "~/models/x", "/a b/c,d [x]/m", "Be brief. Put it in \\boxed{}, # it's", "train[:100]",
    "é", "ends with \\", "{question}?", "(a|b)+",
])
def test_a_text_needs_no_quotes(text):
    configs: list[Config] = []
    cli.compose([f"data.system_prompt={text}", f"model.path={text}"], then=configs.append)
    assert configs[0].data.system_prompt == text and configs[0].model.path == text


@pytest.mark.parametrize(("override", "value"), [
    ("rollout.stop=[</answer>]", ["</answer>"]), ("rollout.stop=</s>", ["</s>"]),
    ("rollout.stop=['a, b',c]", ["a, b", "c"]),
    ("reward.functions=numeric", ["numeric"]), ("reward.weights=1.0,0.5", [1.0, 0.5]),
    ("reward.functions=[/p/lr=1e-5/my rewards.py:f,numeric]", ["/p/lr=1e-5/my rewards.py:f", "numeric"]),
    ("plugins=~/x.py", ["~/x.py"]), ("observability.monitors=wandb", ["wandb"]),
    ("reward.options.regex.pattern=(?s)^<think>.*</think>$", "(?s)^<think>.*</think>$"),
    ("reward.options.regex.pattern=[^,]+", "[^,]+"), ("cluster.env.JAVA=-Da=b -Dc=d", "-Da=b -Dc=d"),
    ("data.train=/a b/c=d/[x],y.jsonl", "/a b/c=d/[x],y.jsonl"),
    ("data.train=[a=1.jsonl,b.jsonl]", ["a=1.jsonl", "b.jsonl"]),
    ("data.train={math: {path: /lr=1e-5/x.jsonl, weight: 2}}", {"math": {"path": "/lr=1e-5/x.jsonl", "weight": 2}}),
    ("data.train={math:{path:a.jsonl}}", {"math": {"path": "a.jsonl"}}), ("data.max_rows=None", None),
    ("eval.data=None", None), ("data.system_prompt=None", None), ("resume=None", None),
])
def test_any_value_can_be_typed_as_it_is(override, value):
    configs: list[Config] = []
    cli.compose([override], then=configs.append)
    found: Any = configs[0]
    for name in override.partition("=")[0].split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value


@pytest.mark.parametrize(("word", "said"), [
    ("--learning_rate=1e-6", "options have no dashes, and one word: train.learning_rate=1e-6"),
    ("--num-generations", "--num-generations: options have no dashes, and one word: rollout.group_size=VALUE"),
    ("--per_device_train_batch_size=4", "a step takes batch.prompts_per_step prompts"),
    ("--nonsense", "unknown option 'nonsense'"),
    ("data.train={math:{path:/lr=1e-5/x.jsonl}}", "no mapping that can be read: put a blank after each colon"),
])
def test_words_of_another_kind_are_answered(capsys, word, said):
    assert cli.main(["train", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_quotes_and_sweeps_are_hydras():
    assert cli._by_our_names(["data.system_prompt='a, b'"]) == ["data.system_prompt='a, b'"]
    assert cli._by_our_names(["model.path=a,b", "--multirun"]) == ["model.path=a,b", "--multirun"]
    assert cli._by_our_names(["rollout.stop=[a,b]"]) == ["rollout.stop=[a,b]"]
    assert cli._by_our_names(["run_dir=${oc.env:X}/y"]) == ["run_dir=${oc.env:X}/y"]


def test_a_locale_without_utf8():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "flux_ray", "explain", "data.system_prompt=é"], env=environment,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == 0 and "π trained" in done.stdout.decode("utf-8")


def test_the_package_has_its_public_names_alone():
    shown = [name for name in dir(flux_ray) if not name.startswith("_")]
    assert sorted(shown) == sorted(flux_ray.__all__) and "__version__" in dir(flux_ray)


def test_version_and_info(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"flux_ray {flux_ray.__version__}\n"
    assert cli.main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].startswith(version("torch")) and lines["gpu"] and lines["cpu"].split()[1] == "cores,"
    assert cli.main(["info", "x"]) == 2


@pytest.mark.parametrize(("words", "told"), [
    (["compare", "a"], "the following arguments are required: RUN"),
    (["replay", "/nothing", "--step", "1"], "flux-ray: /nothing: there is no /nothing/config.yaml, so no run"),
    (["view", "/nothing"], "there is no folder /nothing"),
    (["report", "/nothing"], "there is no folder /nothing"),
    (["chat", "/nothing"], "model '/nothing': no such folder"),
    (["eval", "data=x"], "model is missing"),
])
def test_a_command_about_no_run_is_one_line(capsys, words, told):
    try:
        code = cli.main(words)
    except SystemExit as ended:  # argparse
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and "Traceback" not in error
