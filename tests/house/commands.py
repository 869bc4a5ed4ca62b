"""The commands that README and docs tell people to type.

Takes:  the Markdown files of the repository.
Gives:  `commands()`: (where, verb, overrides) of each `flux-ray VERB`, `python -m flux_ray VERB`, `launch/submit.sh`.
Knows:  a shell's lines that go on, its comments and quotes; `...` stands for what a reader adds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "examples" / "README.md",
         *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:flux-ray|python -m flux_ray) (?:train|explain) [^`]+)`")
STARTS = {("flux-ray",): 1, ("python", "-m", "flux_ray"): 3}
SUBMIT = "launch/submit.sh"
SEPARATORS = ("&&", "||", "|", ";", "&")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += [found.replace("\n", " ") for found in INLINE.findall(text)]
        for line in lines:
            for words in _simple(shlex.split(line, comments=True)):
                found = _ours(words)
                if found:
                    yield f"{page.name}: {line.strip()[:80]}", *found


def _simple(words: list[str]) -> Iterator[list[str]]:
    """A line's commands, each by itself."""
    one: list[str] = []
    for word in [*words, ";"]:
        if word not in SEPARATORS:
            one.append(word)
        elif one:
            yield one
            one = []


def _ours(words: list[str]) -> tuple[str, list[str]] | None:
    if words[0] == SUBMIT:
        rest = words[1:]
        return "train", rest[rest.index("--") + 1:] if "--" in rest else rest
    for start, length in STARTS.items():
        for at in range(len(words)):
            verb = words[at + length:at + length + 1]
            if tuple(words[at:at + length]) == start and verb and not verb[0].startswith("-"):
                return words[at + length], words[at + length + 1:]
    return None
