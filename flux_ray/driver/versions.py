"""Versions and the steps that they hold: a step counts updates and may go back, a version counts publishes.

Never:  forgets a version that a token in flight may have; lets a version go back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Versions:
    """`highest`: the last version that the run has published, by an earlier process too; -1: none.

    >>> versions = Versions(max_staleness=0, highest=6)
    >>> versions.publish(step=4), versions.publish(step=5), versions.holding(5), versions.step_of(7)
    (7, 8, (8,), 4)
    """

    def __init__(self, *, max_staleness: int, highest: int = -1, steps_of: Mapping[int, int] | None = None) -> None:
        """`steps_of`: of versions that tokens of an earlier life have."""
        self._kept_steps = 2 * (max_staleness + 1)
        self.highest = highest
        self._step_of = dict(steps_of or {})

    @property
    def steps_of(self) -> Mapping[int, int]:
        """Of each version that a token in flight may have."""
        return dict(self._step_of)

    def publish(self, step: int) -> int:
        """The number of a new version, which holds that step."""
        self.highest += 1
        self._step_of = {version: held for version, held in self._step_of.items() if held >= step - self._kept_steps}
        self._step_of[self.highest] = step
        return self.highest

    def step_of(self, version: int) -> int:
        return self._step_of[version]

    def staleness(self, step: int, oldest: Iterable[int]) -> list[int]:
        """How many steps each of these versions is behind; a version of -1, where nothing was sampled, has no part."""
        return [step - self.step_of(version) for version in oldest if version >= 0]

    def holding(self, step: int) -> tuple[int, ...]:
        """The versions that hold the step: several where a run went back to it and published it again."""
        return tuple(version for version, held in self._step_of.items() if held == step)
