"""The curve of a run as an SVG: `python docs/images/curve.py RUN > docs/images/quickstart.svg`.

Takes:  a run's folder with metrics.jsonl and eval.jsonl.
Gives:  the task reward of each step as a line, and the mean of each evaluation as a dot.
Knows:  that a page may be light or dark: every colour is of a middle tone, and the background is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 44, 46   # margins, in pixels
GREY, BLUE, ORANGE = "#7d8590", "#4c8ed9", "#d98a3a"
TICK_STEPS = 20                             # steps between two marks of the x axis
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def points(file: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each line that has the metric."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[metric]) for line in lines if metric in line]


def svg(rewards: list[tuple[int, float]], evaluations: list[tuple[int, float]]) -> Iterator[str]:
    last = max(step for step, _ in [*rewards, *evaluations])

    def at(step: float, value: float) -> tuple[float, float]:
        share = (value - LEVELS[0]) / (LEVELS[-1] - LEVELS[0])
        return LEFT + step / last * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="14" '
           f'font-family="Helvetica, Arial, sans-serif" fill="{GREY}" aria-label="Reward and evaluations over steps">')
    for level in LEVELS:
        x, y = at(0, level)
        yield f'<path d="M{x} {y:.1f} H{WIDTH - RIGHT}" stroke="{GREY}" stroke-opacity=".3"/>'
        yield f'<text x="{x - 10}" y="{y + 5:.1f}" text-anchor="end">{level:.1f}</text>'
    for step in range(0, last + 1, TICK_STEPS):
        yield f'<text x="{at(step, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in rewards))
    yield f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>'
    for step, value in evaluations:
        x, y = at(step, value)
        anchor, shift = ("start", 10) if step < last / 2 else ("end", -10)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{ORANGE}"/>'
        yield (f'<text x="{x + shift:.1f}" y="{y + 24:.1f}" text-anchor="{anchor}" fill="{ORANGE}" '
               f'font-weight="bold">{value:.2f}</text>')
    yield f'<path d="M{LEFT} 20 h24" stroke="{BLUE}" stroke-width="2"/>'
    yield f'<text x="{LEFT + 32}" y="25">reward in training</text>'
    yield f'<circle cx="{LEFT + 188}" cy="20" r="6" fill="{ORANGE}"/>'
    yield f'<text x="{LEFT + 202}" y="25">reward on held-out prompts</text>'
    yield "</svg>"


if __name__ == "__main__":
    run = Path(sys.argv[1])
    steps = points(run / "metrics.jsonl", "reward/task_mean")
    print("\n".join(svg(steps, points(run / "eval.jsonl", "eval/task_mean"))))
