"""What a command takes for a model, and the options that come with it."""

import numpy as np
import pytest
import yaml

from flux_ray import __main__ as cli
from flux_ray.errors import UserError
from flux_ray.evaluations import Difference, EvalResult, _differences
from flux_ray.models_of_runs import config_for, parsed, sampling_config_for

pytestmark = pytest.mark.unit


#: A command line ► what its one line says.
MISTAKES = {
    "eval data=x": "model is missing", "eval model=m --against": "--against BASE",
    "eval model=m tempratur=1": "temperature", "eval model=m x": "'x' is no option",
}


@pytest.fixture
def run(tmp_path):
    """A run's folder; `saved` are its options."""

    def made(**saved):
        folder = tmp_path / "run"
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"algo": {"name": "grpo"}, "run_dir": "/gone", **saved}))
        return folder

    return made


def test_a_runs_options_hold_and_those_given_come_over_them(run):
    folder = run(rollout={"temperature": 0.6, "max_tokens": 99}, data={"system_prompt": "Be brief."})
    for model in (folder, folder / "model"):
        config = config_for(str(model), parsed(["temperature=0.2", "eval.num_samples=3"]))
        assert config.model.path == str(folder / "model") and config.run_dir is None
        assert (config.rollout.temperature, config.rollout.max_tokens, config.eval.num_samples) == (0.2, 99, 3)
        assert config.data.system_prompt == "Be brief."


def test_a_model_of_no_run_has_the_defaults():
    config = config_for("org/Model", parsed(["algo=dapo"]))
    assert (config.model.path, config.algo.name, config.rollout.temperature) == ("org/Model", "dapo", 1.0)


def test_a_run_of_completions_is_sampled_from_as_its_data_were_written(run):
    folder = run(algo={"name": "sft"}, data={"system_prompt": "Be brief.", "completion_column": "text"})
    config = sampling_config_for(str(folder), parsed(["rollout.temperature=0.5"]))
    assert config.rollout.temperature == 0.5 and config.data.system_prompt == "Be brief."


def test_what_cannot_be_is_told_in_a_line(run, tmp_path, capsys):
    with pytest.raises(UserError, match="is a reward model's run: it gives scores, and no text"):
        sampling_config_for(str(run(algo={"name": "reward_model"})), {})
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("algo: {name: grpo}\n")
    with pytest.raises(UserError, match="the run has no model/ yet"):
        config_for(str(tmp_path / "begun"), {})
    for words, message in MISTAKES.items():
        assert cli.main(words.split()) == 2
        assert message in capsys.readouterr().err


def lines(values, data_set=""):
    return [{"set": data_set, "row": row, "values": {"mean": value}} for row, value in enumerate(values)]


def test_models_are_compared_prompt_by_prompt():
    ours, theirs = np.arange(20) / 20 + 0.1, np.arange(20) / 20
    found = dict(_differences(lines(ours, "a"), lines(theirs, "a")))
    assert set(found) == {"eval/mean", "eval/a/mean"} and found["eval/mean"] == found["eval/a/mean"]
    assert (found["eval/mean"].low, found["eval/mean"].high) == pytest.approx((0.1, 0.1))
    assert dict(_differences(lines([1.0, None]), lines([0.0, 1.0, 1.0])))["eval/mean"].num_prompts == 1
    assert dict(_differences([], [])) == {}


def test_a_table_has_a_row_for_each_metric(tmp_path):
    metrics = {"eval/mean": 0.5, "eval/mean_low": 0.25, "eval/mean_high": 0.75, "eval/s": 2.0}
    alone = EvalResult(metrics, tmp_path).table().splitlines()
    assert [line.split() for line in alone[1:]] == [["eval/mean", "0.5", "[0.25,", "0.75]"], ["eval/s", "2"]]
    both = EvalResult(metrics, tmp_path, {**metrics, "eval/mean": 0.25},
                      {"eval/mean": Difference(0.25, 0.125, 0.375, 8)}).table().splitlines()
    assert both[1].split() == ["eval/mean", "0.5", "0.25", "+0.25", "[0.125,", "0.375]", "8"]
