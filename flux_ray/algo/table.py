"""The tables of algorithms and formulas in docs/choosing.md, made from what stands beside the code.

Takes:  the registries of algo and batch; the presets.
Gives:  `tables`, as Markdown; `with_tables`, a page's text with them between its two marks; `python -m` writes a page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flux_ray.algo import preferences, supervised, values
from flux_ray.algo.algorithms import ALGORITHMS
from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.algo.kl import KL_ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.algo.objective import CORRECTIONS
from flux_ray.batch import AGGREGATIONS
from flux_ray.config import OFFLINE, PolicyGradientConfig, default_of, objective_of, options_of, preset
from flux_ray.errors import UserError
from flux_ray.formula import SYMBOLS, Formula, full_name

BEGIN, END = "<!-- made by python -m flux_ray.algo.table docs/choosing.md -->", "<!-- end of what is made -->"

COLUMNS = ("formula", "source", "options that it reads")
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def tables() -> str:
    """All of them as Markdown, each under its heading. What others registered in this process is left out."""
    estimators = {name: entry.formula for name, entry in ESTIMATORS.items() if entry.ours}
    losses = {name: entry.formula for name, entry in POLICY_LOSSES.items() if entry.ours}
    aggregations = {name: entry.formula for name, entry in AGGREGATIONS.items()}
    kl = {name: entry.formula for name, entry in KL_ESTIMATORS.items()}
    corrections = {name: entry.formula for name, entry in CORRECTIONS.items()}
    parts = {
        "Algorithms": table(("`algo=`", "source", "estimator", "loss", "aggregation", "what it sets otherwise"),
                             _algorithms()),
        "Estimators: the advantage A": _formulas("`algo.estimator=`", estimators),
        "Losses: the policy term": _formulas("`algo.policy_loss=`", losses),
        "Aggregations: the weight w of a loss token": _formulas("`algo.aggregation=`", aggregations),
        "The KL to the reference, per loss token": _formulas("`algo.kl_estimator=`", kl),
        "Corrections: what the policy term is multiplied by": _formulas("`algo.off_policy=`", corrections),
        "The critic, per loss token": _formulas("loss of", {"critic": values.FORMULA}),
        "Pairs and completions": table(("`algo=`", *COLUMNS, "what it sets otherwise"), [
            (*row, _preset(name)) for name, row in _rows({**preferences.FORMULAS, "sft": supervised.FORMULA})]),
    }
    return "\n\n".join(f"### {heading}\n\n{table}" for heading, table in parts.items())


def with_tables(page: str) -> str:
    """The page with what is made between its marks made anew. Raises UserError for a page without them."""
    return between(page, BEGIN, END, tables())


def between(page: str, begin: str, end: str, made: str) -> str:
    """The page with `made` between two marks. Raises UserError for a page without them."""
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise UserError(f"the page has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def _algorithms() -> Iterator[Sequence[str]]:
    for name, algorithm in ALGORITHMS.items():
        parts = (algorithm.estimator, algorithm.policy_loss, algorithm.aggregation)
        yield f"`{name}`", _linked(algorithm.source), *(f"`{part}`" for part in parts), _preset(name)


def _preset(name: str) -> str:
    """The options as one would type them: of the preset, and the objective's own defaults that are not grpo's."""
    usual = {key: default_of(f) for key, f in options_of(PolicyGradientConfig)}
    own = {key: default_of(f) for key, f in options_of(objective_of(name)) if key in usual or name in OFFLINE}
    numbers = {key: value for key, value in own.items() if key.startswith(("algo.", "train.")) and value is not False}
    values = {key: value for key, value in numbers.items() if value != usual.get(key)} | dict(_leaves(preset(name)))
    typed = [f"`{key}={_typed(value)}`" for key, value in values.items() if key != "algo.name"]
    return ", ".join(typed) or "nothing"


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _formulas(title: str, formulas: Mapping[str, Formula]) -> str:
    return table((title, *COLUMNS), [row for _, row in _rows(formulas)])


def _rows(formulas: Mapping[str, Formula]) -> Iterator[tuple[str, Sequence[str]]]:
    """(name, its row) of each."""
    for name, formula in formulas.items():
        options = ", ".join(map(_option, formula.options))
        yield name, (f"`{name}`", formula.symbolic(), _linked(formula.source), options)


def _option(option: str) -> str:
    symbol = SYMBOLS.get(option)
    return f"`{full_name(option)}` {symbol}" if symbol else f"`{full_name(option)}`"


def _linked(source: str) -> str:
    return ARXIV.sub(lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[0]})", source)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_line(titles), "|" + "---|" * len(titles), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    written = [cell.replace("|", "\\|") for cell in cells]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in written) + "|"


def main(arguments: Sequence[str]) -> None:
    """Writes the pages that are named anew; without any, prints the tables."""
    if not arguments:
        print(tables())
    for page in map(Path, arguments):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
