"""Parts of a page that needs nothing beside itself: tables, curves as SVG.

Takes:  texts and numbers.
Gives:  `page`, `table`, `curve`, `shown`.
Knows:  every text is escaped here, and the page's policy allows no script and no address.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from flux_ray.observability.page.figures import Points

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 150, 60, 22, 8  # of a curve, in pixels
MOST_POINTS = 300  # of a curve: a longer one is drawn by means of neighbours
COLOURS = ("#2a7fd4", "#d9822b")
STYLE = """
:root{color-scheme:light dark;--line:light-dark(#d5d9e0,#363c47);--faint:light-dark(#5b6472,#9aa3b2);
--raised:light-dark(#f5f6f8,#1d2128);font:15px/1.45 system-ui,sans-serif}
body{background:light-dark(#fff,#14171c);color:light-dark(#1b1f26,#e3e6eb);max-width:76em;margin:0 auto;padding:1em}
h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .5em}h3{font:600 .9em ui-monospace,monospace;margin:0}
p,.faint{color:var(--faint)}.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22em),1fr));gap:.8em}
figure{margin:0;border:1px solid var(--line);border-radius:.4em;padding:.5em .6em}svg{width:100%;height:auto}
svg text{font-size:10px;fill:var(--faint)}svg .axis{stroke:var(--line)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.93em}th,td{text-align:left;padding:.25em .7em;vertical-align:top;
border-bottom:1px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere}
th{background:var(--raised);white-space:nowrap}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}summary{cursor:pointer;margin:.8em 0}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole file of HTML."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n'
            + "\n".join(parts) + "\n</body></html>\n")


def heading(text: str) -> str:
    return f"<h2>{_text(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{inside}</details>"


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers stand to the right."""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td class="n">{shown(value)}</td>' if is_number else f"<td>{_text(shown(value))}</td>"


def shown(value: object) -> str:
    """A number with at most four digits that count; anything else as text."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def curves(figures: Iterable[str]) -> str:
    return f'<div class="curves">{"".join(figures)}</div>'


def curve(name: str, of_runs: Sequence[Points]) -> str:
    """The lines of one metric, of one or two runs, over the steps."""
    lines = [_thinned(points) for points in of_runs]
    every = [point for points in lines for point in points]
    (left, right), (low, high) = _extent([x for x, _ in every]), _extent([y for _, y in every])
    last = ", ".join(shown(points[-1][1]) for points in of_runs if points)

    def at(x: float, y: float) -> str:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 6)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP):.1f}"

    drawn = "".join(f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.6" '
                    f'points="{" ".join(at(*point) for point in points)}"/>'
                    for i, points in enumerate(lines) if points)
    heights = {y: at(left, y).partition(",")[2] for y in (low, (low + high) / 2, high)}
    marks = "".join(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{at_y}" y2="{at_y}"/>'
                    f'<text x="{LEFT - 4}" y="{at_y}" dy="3" text-anchor="end">{y:.3g}</text>'
                    for y, at_y in heights.items())
    steps = (f'<text x="{LEFT}" y="{HEIGHT - 6}">{shown(left)}</text>'
             f'<text x="{WIDTH - 4}" y="{HEIGHT - 6}" text-anchor="end">{shown(right)}</text>')
    return (f'<figure><h3>{_text(name)}</h3><div class="faint">{_text(last)}</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{_text(name)} by step; last: {_text(last)}">{marks}{steps}{drawn}</svg></figure>')


def _extent(values: list[float]) -> tuple[float, float]:
    """The least and the most, apart from each other."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _thinned(points: Points) -> Points:
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[begin:begin + size] for begin in range(0, len(points), size or 1)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def _text(text: str) -> str:
    return html.escape(text, quote=True)
