import re

import pytest

from flux_ray.config import PolicyGradientConfig, PromptDataConfig, RewardConfig, from_dict
from flux_ray.errors import UserError
from flux_ray.plugins import load_function, load_plugins
from flux_ray.reward import registry
from flux_ray.reward.registry import (
    answers_in,
    find_answer_column,
    get_reward,
    list_rewards,
    register_reward,
    resolve_functions,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def rewards(**knobs):
    return PolicyGradientConfig(reward=RewardConfig(**knobs))


def resolved(config, columns):
    return resolve_functions(config.reward, config.data, columns)


def test_an_answer_column_alone_means_numeric_or_exact():
    for column in ("answer", "solution", "label"):
        (function,) = resolved(PolicyGradientConfig(), {column, "other"})
        assert function.name == "numeric_or_exact"
    (function,) = resolved(PolicyGradientConfig(data=PromptDataConfig(answer_column="gold")), {"gold"})
    assert function.name == "numeric_or_exact"


def test_nothing_to_reward_with_is_refused_naming_the_ways():
    with pytest.raises(UserError) as error:
        resolved(PolicyGradientConfig(), {"topic"})
    for way in ("topic", "data.answer_column", "reward.functions", "exact_match", "file.py:my_", "register_reward"):
        assert way in str(error.value)


def test_weights_and_options_go_with_their_functions():
    config = rewards(functions=["exact_match", "length"], weights=[2, 0.5], options={"length": {"target": 4}})
    exact, length = resolved(config, {"answer"})
    assert (exact.weight, exact.options, exact.is_shaping) == (2.0, {}, False)
    assert (length.weight, length.options, length.is_shaping) == (0.5, {"target": 4}, True)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"functions": ["exact_mach"]}, "unknown reward 'exact_mach': did you mean 'exact_match'?"),
        ({"functions": ["exact_match"], "weights": [1.0, 2.0]}, "reward.weights has 2 values for 1 functions"),
        ({"functions": ["regex", "regex"]}, "names 'regex' twice"),
        ({"functions": ["regex"], "options": {"regx": {}}}, "reward.options: unknown function 'regx': did you mean"),
        ({"functions": ["regex"], "options": {"regex": {"patern": "a"}}}, "unknown option 'patern': did you mean"),
        ({"functions": ["regex"], "options": {"regex": {"pattern": "("}}}, "reward.options.regex:"),
        ({"functions": ["repetition"], "options": {"repetition": {"ngram": 0}}}, "ngram must be >= 1, got 0"),
        ({"functions": ["numeric"], "options": {"numeric": {"tolerance": "much"}}}, "reward.options.numeric:"),
        ({"functions": ["exact_match"], "options": {"exact_match": {"answer": "a"}}}, "unknown option 'answer'"),
        ({"functions": [":f"]}, "not of the form"),
        ({"functions": ["no_such_package.rewards:f"]}, "No module named 'no_such_package'"),
        ({"functions": ["gone.py:f"]}, "there is no file"),
    ],
)
def test_what_cannot_be_is_refused_by_name_at_start(knobs, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        resolved(rewards(**knobs), {"answer"})
    assert "\n" not in str(error.value)


def test_a_rule_without_its_answer_column_is_refused():
    with pytest.raises(UserError, match=r"exact_match needs unknown column 'answer'.*known: gold"):
        resolved(rewards(functions=["exact_match"]), {"gold"})


def test_a_function_of_ones_own_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import beside\ndef by_length(completions, **kw):\n    return [beside.ONE] * len(completions)\n")
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    function = load_function(f"{path}:by_length", option="reward.functions")
    assert function(completions=["a", "b"]) == [1.0, 1.0]
    assert load_function(f"{path}:by_length", option="reward.functions") is function


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(completions): ...", "unknown function 'othr': did you mean 'other'? (known: other)"),
        ("\nimport no_such_thing", "line 2 failed: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("x = 1\ndef f(:", "line 2 failed: SyntaxError"),
        ("raise RuntimeError('at import')", "line 1 failed: RuntimeError: at import"),
        ("othr = 3", "othr is int, not a function"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_failed_in_one_line(tmp_path, code, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_function(f"{path}:othr", option="reward.functions")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_function_needs_columns_that_are_there(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(completions, topic, scale=1): ...\ndef g(completions, *, level): ...\n")
    resolved(rewards(functions=[f"{path}:f"]), {"topic"})
    with pytest.raises(UserError, match=r"reward f needs unknown column 'topic': did you mean 'topics'"):
        resolved(rewards(functions=[f"{path}:f"]), {"topics"})
    resolved(rewards(functions=[f"{path}:g"], options={"g": {"level": 2}}), {"topic"})
    with pytest.raises(UserError, match=r"options\.f: unknown option 'scal': did you mean 'scale'"):
        resolved(rewards(functions=[f"{path}:f"], options={"f": {"scal": 2}}), {"topic"})


def test_a_plugin_may_also_be_named_as_a_file(registered, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from flux_ray.reward.registry import register_reward\n"
        "@register_reward('mine')\ndef by_length(completions):\n    return [0.0 for c in completions]\n"
    )
    load_plugins([str(path)])
    functions = resolved(rewards(functions=["mine", f"{path}:by_length"]), set())
    assert functions[0].call is functions[1].call


def test_registered_rewards(registered):
    @register_reward("mine")
    def mine(completions, **columns):
        return [0.0 for _ in completions]

    @register_reward("brief", shaping=True)
    def brief(completions, **columns):
        return [0.0 for _ in completions]

    assert get_reward("mine") is mine and {"mine", "exact_match"} <= set(list_rewards())
    shaping = [function.is_shaping for function in resolved(rewards(functions=["mine", "brief"]), set())]
    assert shaping == [False, True]
    for taken in ("mine", "exact_match"):
        with pytest.raises(ValueError, match="registered already"):
            register_reward(taken)(mine)


@pytest.mark.parametrize(
    ("column", "cells", "answers"),
    [
        ("answer", ["1", ["2", "3"], None], ["1", ["2", "3"], None]),
        ("reward_model.ground_truth", [{"style": "rule", "ground_truth": "42"}, None], ["42", None]),
        ("answer", [{"style": "rule", "ground_truth": "42"}], "data.answer_column=answer.ground_truth"),
        ("answer", [[{"value": 1}]], "data.answer_column=answer.value"),
        ("reward_model.truth", [{"style": "rule", "ground_truth": "42"}], "no row has it (column 'reward_model' holds "
                                                                          "style, ground_truth)"),
        ("answer.x", ["42"], "no row has it (column 'answer' holds str, no object)"),
    ],
)
def test_an_answer_is_found_in_its_cell_or_refused_by_name(column, cells, answers):
    columns = {column.partition(".")[0]}
    assert find_answer_column(PromptDataConfig(answer_column=column), columns) == column
    if isinstance(answers, list):
        assert answers_in(column, {next(iter(columns)): cells}.__getitem__, columns) == answers
        return
    with pytest.raises(UserError, match=re.escape(answers)):
        answers_in(column, {next(iter(columns)): cells}.__getitem__, columns)


def test_a_column_that_was_named_and_is_not_there_is_not_replaced_by_another():
    with pytest.raises(UserError, match=r"data\.answer_column: unknown column 'gold'"):
        resolved(from_dict({"data.answer_column": "gold"}), {"answer", "solution"})
