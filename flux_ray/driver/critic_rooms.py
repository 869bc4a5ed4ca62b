"""The critic's ranks as the loop sees them.

Takes:  an actor group as large as the training group; the groups of each rank, as handles.
Gives:  values, which stay with the critic's ranks; a step towards the returns that the policy's ranks hold.
Never:  decides anything.
"""

from __future__ import annotations

from typing import Any

from flux_ray.cluster.group import ActorGroup, first_failure
from flux_ray.config import Config
from flux_ray.driver.clock import now_s


class CriticRooms:
    def __init__(self, config: Config, critic: ActorGroup) -> None:
        self._deadline_s = config.train.deadline_s
        self._critic = critic

    async def values(self, shares: list[list[Any]]) -> list[Any]:
        """A handle of the values of each rank's groups."""
        started = [self._critic.submit(rank, "values_and_done", groups, num_returns=2)
                   for rank, groups in enumerate(shares)]
        await first_failure([
            self._critic.result(done, index=rank, what="values", deadline_s=self._deadline_s)
            for rank, (_, done) in enumerate(started)
        ])
        return [values for values, _ in started]

    async def learn(self, calls: list[dict[str, Any]]) -> dict[str, float]:
        """One step of all ranks; critic/*, reduced over them already, and critic/step_s."""
        start_s = now_s()
        reports = await first_failure([
            self._critic.call(rank, "train_step", deadline_s=self._deadline_s, **call)
            for rank, call in enumerate(calls)
        ])
        return reports[0].metrics | {"critic/step_s": now_s() - start_s}
