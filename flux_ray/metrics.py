"""The metrics for people: `flux-ray metrics`, and the tables in docs/metrics.md.

Takes:  the catalogue of metrics.
Gives:  `command`, for the command line; `tables`, as Markdown; `with_tables`, a page's text with them between its two
        marks; `python -m` writes a page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_ray import help as helps
from flux_ray.algo.table import between, table
from flux_ray.errors import UserError, unknown
from flux_ray.observability.described import Described, plain
from flux_ray.run.catalogue import ALL, SECTIONS, find

BEGIN, END = "<!-- made by python -m flux_ray.metrics docs/metrics.md -->", "<!-- end of what is made -->"
COLUMNS = ("metric", "what it is", "unit", "over", "healthy", "when it is not")

USAGE = """\
flux-ray metrics           every metric in one line
flux-ray metrics NAME      what it is, its unit, what is healthy, and what to do else; NAME may be a group, as actor
"""


def command(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if len(arguments) > 1:
        raise UserError("flux-ray metrics takes one NAME at most: a metric, or a group of them")
    for line in _all_lines() if not arguments else _lines_of(arguments[0]):
        print(line)
    return 0


def _all_lines() -> Iterator[str]:
    width = max(len(one.name) for one in ALL)
    for heading, section in SECTIONS.items():
        yield f"{heading}:"
        for one in section:
            healthy = f"; healthy: {plain(str(one.healthy))}" if one.healthy else ""
            yield helps.paragraph(f"  {one.name:<{width}}  {plain(one.formula)}{healthy}", indent=width + 4)


def _lines_of(name: str) -> Iterator[str]:
    """UserError for a name that neither a metric nor a group has."""
    group = [one for one in ALL if one.name.partition("/")[0] == name.rstrip("/")]
    one = find(name)
    if not group and one is None:
        raise unknown("metric", name, [known.name for known in ALL])
    for described in group or ([one] if one else []):
        yield described.name
        rows = (("is", described.formula), ("unit", described.unit), ("over", described.over),
                ("healthy", str(described.healthy)), ("otherwise", described.otherwise))
        for label, text in rows:
            if text:
                yield helps.paragraph(f"  {label:<10} {plain(text)}", indent=13)


def tables() -> str:
    """All metrics as Markdown, each section under its heading."""
    return "\n\n".join(f"## {heading}\n\n{table(COLUMNS, map(_row, section))}"
                       for heading, section in SECTIONS.items())


def _row(one: Described) -> Sequence[str]:
    return f"`{one.name}`", one.formula, one.unit, one.over, str(one.healthy), one.otherwise


def with_tables(page: str) -> str:
    """The page with what is made between its marks made anew. Raises UserError for a page without them."""
    return between(page, BEGIN, END, tables())


def main(arguments: Sequence[str]) -> None:
    """Writes the page that is named anew."""
    for page in map(Path, arguments):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
