"""An evaluation: every prompt of eval.data, once, under the weights that the engines serve.

Takes:  the evaluation's prompts, the rooms.
Gives:  eval/mean and its parts, lengths, and the first answers as text.
Knows:  it runs between steps; where generation is asynchronous, prompts of later steps go on beside it.
"""

from __future__ import annotations

import time

from flux_ray.cluster.group import ActorError, first_failure
from flux_ray.config import Config
from flux_ray.data import PromptSource
from flux_ray.driver.drops import refuse_unless_droppable
from flux_ray.driver.measure import length_metrics, reward_metrics
from flux_ray.driver.recorder import Recorder
from flux_ray.driver.rooms import Rolled, SamplingRooms
from flux_ray.records import ScoredGroup
from flux_ray.rollout.dispatch import Lengths

NUM_ANSWERS = 16  # answers kept as text, for people


class Evaluation:
    def __init__(self, config: Config, prompts: PromptSource) -> None:
        self._config, self._prompts = config, prompts
        self._temperature = config.eval.temperature
        self._lengths = Lengths(config.rollout.max_tokens)  # of these rows, from one evaluation to the next

    async def run(self, rooms: SamplingRooms, *, version: int, recorder: Recorder) -> dict[str, float]:
        start_s = time.monotonic()
        everyone = await first_failure(
            [self._one(rooms, uid, version, recorder) for uid in range(self._prompts.num_rows)]
        )
        answered = [(uid, *one) for uid, one in enumerate(everyone) if one is not None]
        groups = [scored for _, _, scored in answered]
        if not groups:
            raise RuntimeError(f"evaluation at step {version}: every reward failed; the log has each of them")
        metrics = reward_metrics(groups, "eval") | length_metrics(groups, "eval")
        failed = float(len(everyone) - len(groups))
        metrics |= {"eval/prompts": float(len(groups)), "eval/failed": failed, "eval/s": time.monotonic() - start_s}
        answers = []
        for uid, rolled, scored in answered[:NUM_ANSWERS]:
            try:
                texts = await rooms.texts(rolled, beside=self._prompts.num_rows)
            except ActorError as error:  # its worker died of what others asked of it
                refuse_unless_droppable(error, self._config)
                continue
            answers.append(
                {"prompt": self._prompts.prompt(uid).text, "completion": texts[0], "reward": scored.rewards[0]}
            )
        recorder.evaluation(version, metrics, answers)
        return metrics

    async def _one(
        self, rooms: SamplingRooms, uid: int, version: int, recorder: Recorder
    ) -> tuple[Rolled, ScoredGroup] | None:
        """None where its reward failed and the run goes on."""
        prompt = self._prompts.prompt(uid)
        rolled = await rooms.roll(prompt, lengths=self._lengths, born=version, temperature=self._temperature)
        try:
            return rolled, await rooms.score(rolled, beside=self._prompts.num_rows)
        except ActorError as error:
            refuse_unless_droppable(error, self._config)
            recorder.warn_of("evaluation", f"evaluation, prompt row {rolled.row + 1} (from 1) left out: {error}")
            return None
