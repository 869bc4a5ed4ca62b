"""An evaluation: every prompt of eval.data, once, under the weights that the engines serve.

Takes:  the evaluation's prompts, the rooms.
Gives:  eval/mean and its parts, lengths, and the first answers as text.
Never:  runs while a step generates: the loop calls it between steps.
"""

from __future__ import annotations

import asyncio
import time

from flux_ray.cluster.group import ActorError, first_failure
from flux_ray.config import Config
from flux_ray.data import PromptSource
from flux_ray.driver.drops import refuse_unless_droppable
from flux_ray.driver.measure import length_metrics, reward_metrics
from flux_ray.driver.recorder import Recorder
from flux_ray.driver.rooms import Rolled, SamplingRooms
from flux_ray.records import ScoredGroup

NUM_ANSWERS = 16  # answers kept as text, for people


class Evaluation:
    def __init__(self, config: Config, prompts: PromptSource) -> None:
        self._config, self._prompts = config, prompts
        self._temperature = config.eval.temperature
        # As many as the engines run at once: more would only wait there, and a request's deadline with them.
        at_once = config.rollout.num_engines * config.rollout.max_num_seqs // config.eval.num_samples
        self._turn = asyncio.Semaphore(max(1, at_once))

    async def run(self, rooms: SamplingRooms, *, version: int, recorder: Recorder) -> dict[str, float]:
        start_s = time.monotonic()
        everyone = await first_failure([self._one(rooms, uid, recorder) for uid in range(self._prompts.num_rows)])
        answered = [(uid, *one) for uid, one in enumerate(everyone) if one is not None]
        groups = [scored for _, _, scored in answered]
        if not groups:
            raise RuntimeError(f"evaluation at step {version}: every reward failed; the log has each of them")
        metrics = reward_metrics(groups, "eval") | length_metrics(groups, "eval")
        failed = float(len(everyone) - len(groups))
        metrics |= {"eval/prompts": float(len(groups)), "eval/failed": failed, "eval/s": time.monotonic() - start_s}
        answers = []
        for uid, rolled, scored in answered[:NUM_ANSWERS]:
            texts = await rooms.texts(rolled)
            answers.append(
                {"prompt": self._prompts.prompt(uid).text, "completion": texts[0], "reward": scored.rewards[0]}
            )
        recorder.evaluation(version, metrics, answers)
        return metrics

    async def _one(
        self, rooms: SamplingRooms, uid: int, recorder: Recorder
    ) -> tuple[Rolled, ScoredGroup] | None:
        """None where its reward failed and the run goes on."""
        async with self._turn:
            rolled = await rooms.roll(self._prompts.prompt(uid), temperature=self._temperature)
        try:
            return rolled, await rooms.score(rolled)
        except ActorError as error:
            refuse_unless_droppable(error, self._config)
            recorder.warn(f"evaluation, prompt row {rolled.row + 1} (from 1) left out: {error}")
            return None
