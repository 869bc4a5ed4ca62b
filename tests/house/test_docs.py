"""README and docs: every metric, every option in a command, every link; the site builds.

docs/metrics.md names what is measured; the tests of whole runs hold what they write against it.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from flux_ray import config as configs
from flux_ray.__main__ import COMMANDS, COMPOSING, OVERRIDE, compose
from flux_ray.algo.table import with_tables
from flux_ray.backends.trl import METRICS as OF_TRL
from flux_ray.driver.drop_stats import CAUSES
from flux_ray.errors import UserError
from flux_ray.metrics import with_tables as with_metrics
from flux_ray.names import RENAMED, sections_of
from tests.house.commands import PAGES, REPO, commands
from tests.house.documented import names, undocumented
from tests.house.source import modules

pytestmark = pytest.mark.unit

MOST_README_LINES = 150
FEWEST_COMMANDS = 30   # fewer found: the pages are written in a way that the search doesn't know
GROUPS = "gpu|reward|rollout|reference|actor|critic|train|weights|driver|filter|pairs|eval"  # of metrics
OF_THE_READER = ("experiment=mine", "algo=NAME")
OF_THE_VERB = {"eval": ("model=", "data="), "passrates": ("data=",)}   # words that are no options
NAMED = re.compile(r"`[+']*([a-z]+(?:\.[a-z_0-9]+)+)(?==|`|'|,| )")
#: A module, a script or a file of the repository that a page names.
PROGRAM = re.compile(r"python -m ((?:examples|benchmarks)\.\w+)|\b((?:launch|examples|benchmarks)/[\w/]+\.(?:sh|py))")
#: A file of the package or its tests, and a function or class in it.
IN_FILE = re.compile(r"`((?:flux_ray|tests|docs|conf)/[\w/.-]+\.(?:py|yaml))`(?::\s`([\w.]+)`)?")
SVG = "{http://www.w3.org/2000/svg}"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_every_formula_s_name_is_on_the_page():
    written = [*OF_TRL.values()]
    written += [f"filter/{what}_{cause}" for what in ("dropped", "rate", "length") for cause in CAUSES]
    assert undocumented(written) == []


def test_what_is_not_on_the_page_is_seen():
    assert undocumented(["step", "reward/mine", "reward/mine/part", "actor/loss"]) == []
    unknown = ["actor/los", "nothing/at_all", "reward/a/b/c"]
    assert undocumented(unknown) == unknown


def test_the_page_is_made_from_the_catalogue_and_says_nothing_twice():
    page = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == with_metrics(page), "python -m flux_ray.metrics docs/metrics.md"
    assert len(names()) == len(set(names())) > 90


def test_every_metric_that_code_writes_has_its_entry():
    """Names in the package's own text, which is what a run's metrics are called."""
    left_out = ("flux_ray.names", "flux_ray.run.catalogue")
    written = {(name, path.name) for module, path, tree in modules() if not module.startswith(left_out)
               for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
               for name in [node.value] if re.fullmatch(f"({GROUPS})/[a-z_]+[a-z]", name)}
    assert len(written) > 60
    assert undocumented(name for name, _ in written) == []


def test_every_command_on_a_page_has_options_that_exist():
    """Composed as the command line does; an experiment of the reader's own and a run to go on with are left out."""
    found, wrong, right = list(commands()), [], set()
    assert len(found) > FEWEST_COMMANDS
    for where, verb, words in found:
        overrides = [word for word in words if OVERRIDE.fullmatch(word) and "=" in word and not word.startswith("-")]
        left_out = ("resume=", *OF_THE_VERB.get(verb, ()))
        overrides = [word for word in overrides if word not in OF_THE_READER and not word.startswith(left_out)]
        try:
            assert verb in {**COMPOSING, **COMMANDS}, f"unknown verb {verb}"
            if tuple(overrides) not in right:  # one stands on several pages
                compose([word.replace("seed=0,1,2", "seed=0") for word in overrides], then=lambda config: None)
                right.add(tuple(overrides))
        except (UserError, AssertionError) as error:
            wrong.append(f"{where}: {error}")
    assert wrong == []


def test_programs_that_are_named_exist():
    texts = [*PAGES, REPO / "mkdocs.yml", *(REPO / "conf").rglob("*.yaml")]
    found = {(path.name, name) for path in texts for names in PROGRAM.findall(path.read_text(encoding="utf-8"))
             for name in names if name}
    assert len(found) > FEWEST_COMMANDS
    missing = [(page, name) for page, name in sorted(found)
               if not (REPO / (name if "/" in name else f"{name.replace('.', '/')}.py")).is_file()]
    assert missing == []


def test_a_wrong_option_on_a_page_would_be_seen():
    with pytest.raises(UserError, match="did you mean"):
        compose(["rollout.grop_size=4"], then=lambda config: None)


def test_options_named_in_the_text_exist():
    """`section.option`, with or without a value, wherever it stands in code marks."""
    options = {key for key, _ in configs.options()}
    sections = {section for key in options for section in sections_of(key)}
    open_ones = configs.open_options()
    wrong = []
    for page in PAGES:
        if page.name == "coming-from.md":   # half of its names are others'
            continue
        for name in NAMED.findall(page.read_text(encoding="utf-8")):
            section = name.partition(".")[0]
            known = name in options or name in sections or any(name.startswith(f"{key}.") for key in open_ones)
            is_file = name.rpartition(".")[2] in ("py", "md", "json", "jsonl", "yaml")
            if section in sections and not known and not is_file:
                wrong.append(f"{page.name}: {name}")
    assert wrong == []


def test_other_libraries_names_lead_to_options_of_ours():
    options, wrong = {key for key, _ in configs.options()}, []
    for line in (REPO / "docs" / "coming-from.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if len(cells) < 4:
            continue
        for name in NAMED.findall(cells[2]):
            if name not in options and not any(name.startswith(f"{key}.") for key in configs.open_options()):
                wrong.append(name)
    assert wrong == []


def test_the_site_builds_and_no_link_in_it_is_dead(tmp_path):
    """mkdocs.yml makes a dead link or anchor a warning, which `--strict` fails for."""
    pytest.importorskip("mkdocs", reason="mkdocs isn't installed: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material isn't installed: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings isn't installed: pip install -e '.[docs]'")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "index.html").is_file()


def test_the_tables_of_formulas_are_those_of_the_code():
    page = REPO / "docs" / "choosing.md"
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text), "the formulas have changed: python -m flux_ray.algo.table docs/choosing.md"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(UserError, match="the page has no lines"):
        with_tables("# Choosing\n")


def test_links_of_the_readme_lead_somewhere():
    """The site doesn't hold README and CHANGELOG."""
    for page in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"):
        targets = LINK.findall((REPO / page).read_text(encoding="utf-8"))
        folder = (REPO / page).parent
        missing = [target for target in targets if "://" not in target and not (folder / target).exists()]
        assert missing == [], page


def test_files_and_functions_named_in_the_pages_exist():
    """`flux_ray/….py`, and `flux_ray/….py`: `name` or `Class.name`."""
    wrong = []
    for page in PAGES:
        for file, name in IN_FILE.findall(page.read_text(encoding="utf-8")):
            path = REPO / file
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            defined = all(re.search(rf"^ *(async def|def|class) {part}\b|^{part}\b.*=", text, re.MULTILINE)
                          for part in name.split(".") if part)
            if not text or not defined:
                wrong.append(f"{page.name}: {file} {name}")
    assert wrong == []


def test_the_curve_of_a_run_is_drawn(tmp_path):
    steps = [{"step": step, "reward/task_mean": 0.5 + step / 10} for step in range(4)]
    evaluations = [{"step": 0, "eval/task_mean": 0.5}, {"step": 4, "eval/task_mean": 0.875}]
    for name, lines in (("metrics.jsonl", steps), ("eval.jsonl", evaluations)):
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    drawn = subprocess.run([sys.executable, "docs/images/curve.py", str(tmp_path)], cwd=REPO, capture_output=True,
                           text=True, timeout=60, check=True).stdout
    picture = ElementTree.fromstring(drawn)
    line, = picture.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 4
    assert points == sorted(points) and [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert {"0.50", "0.88"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_no_name_is_lost():
    """What an option or metric of 0.1.0 was called leads to what it is called now."""
    old = (REPO / "tests" / "house" / "names_of_0_1_0.txt").read_text(encoding="utf-8").split()
    now = {key for key, _ in configs.options()} | set(names())
    assert len(old) > len(now) / 2
    assert [name for name in old if RENAMED.get(name, name) not in now] == []
    assert set(RENAMED.values()) <= now and not set(RENAMED) & now


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES
