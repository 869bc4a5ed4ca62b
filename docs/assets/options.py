"""Writes the table of docs/options.md when the site is built: from the config, so that it can't be out of date.

Takes:  the page's text, with its mark.
Gives:  the text with one table for each section of the config.
Knows:  mkdocs' hooks: https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

from typing import Any

from flux_ray.help import options_by_section

MARK = "<!-- options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, _tables()) if MARK in markdown else markdown


def _tables() -> str:
    lines = []
    for section, entries in options_by_section():
        lines += ["", f"## {section}", "", "| option | default | meaning |", "|---|---|---|"]
        lines += [f"| `{option}` | `{default}` | {_cell(meaning)} |" for option, default, meaning in entries]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """As it is in a cell: `|` would end it, `<`, `*` and `_` would be read as Markdown."""
    for mark in "|<>[]*_":
        text = text.replace(mark, f"\\{mark}")
    return text
