"""Any text that is given on the command line, or in a file, arrives as itself."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis isn't installed: pip install -e '.[test]'")

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flux_ray import __main__ as cli
from flux_ray.names.words import hydra_value

pytestmark = pytest.mark.unit

MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
#: What Hydra's grammar has a meaning for, and what it takes for something else than text.
TEXTS = (st.text(max_size=20).filter(lambda text: "\0" not in text)
         | st.text(alphabet="ab01.eE+-_ '\"\\,:{}[]()=$~#@%*?/|!&\t", max_size=12)
         | st.sampled_from(["007", "1e5", "-inf", "+nan", "True", "off", "1:30", "a,b", "[a", "'tis", '"', "\\",
                            "it's \\'quoted\\'", "sweep(1,2)", "glob(*)", "a\\,b", " a ", "a  b", "{a:1}", "[1,2]"]))
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-10**9, 10**9) | TEXTS,
                      lambda inner: st.lists(inner, max_size=3), max_leaves=6)


def read(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()


def is_hydra_s_own(text: str) -> bool:
    """An interpolation, the word null (or Python's), or a text that its user has put into quotes."""
    if "${" in text or text.strip().lower() == "null" or text == "None":
        return True
    return text.strip()[:1] in ("'", '"') and text.strip()[:1] == text.strip()[-1:]


@MANY
@given(TEXTS.filter(lambda text: text and not is_hydra_s_own(text)))
@example("/data/runs/lr=1e-5/model")
def test_a_text_on_the_command_line_arrives_as_itself(text):
    for key in ("data.system_prompt", "model.path", "run_dir"):
        value = read(cli._quoted(f"{key}={text}", several=False))
        assert value == text and isinstance(value, str)


def test_null_and_quotes_are_what_they_are_to_hydra():
    assert read(cli._quoted("model.path=null", several=False)) is None
    assert read(cli._quoted("model.path=None", several=False)) is None, "as Python writes it"
    assert read(cli._quoted("data.system_prompt='a, b'", several=False)) == "a, b"
    assert cli._quoted("run_dir=${oc.env:X}/y", several=False) == "run_dir=${oc.env:X}/y"


@MANY
@given(VALUES)
def test_a_value_of_a_file_arrives_as_itself(value):
    found = read(f"k={hydra_value(value)}")
    assert found == value and type(found) is type(value)
