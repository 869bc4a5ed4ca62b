"""An evaluation: every prompt of eval.data, once, under the weights that the engines serve.

Takes:  the evaluation's prompts, the stages.
Gives:  eval/mean and its parts, lengths, and the first answers as text; of several sets, eval/NAME/... of each too.
Knows:  it runs between steps; where generation is asynchronous, prompts of later steps go on beside it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from flux_ray.clock import now_s
from flux_ray.cluster.group import first_failure
from flux_ray.config import RolloutConfig
from flux_ray.data import PromptSource
from flux_ray.driver.stages import Stages
from flux_ray.messages import GroupReady
from flux_ray.observability.described import Described
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import Lengths

NUM_ANSWERS = 16  # answers kept as text, for people

#: Metrics; prompt, completion and reward of the first prompts.
Evaluated = tuple[dict[str, float], list[dict[str, object]]]

METRICS = (
    Described("eval/prompts", "prompts that were scored", "prompt", "the evaluation"),
    Described("eval/failed", "prompts whose reward failed (`reward.on_failure=drop`)", "prompt", "the evaluation", "0",
              "`run.log` has what the reward function raised"),
    Described("eval/s", "time of the evaluation", "s"),
)


class Evaluation:
    def __init__(self, config: RolloutConfig, prompts: PromptSource, stages: Stages, *, temperature: float | None
                 ) -> None:
        """`temperature`: None for the rollout's own."""
        self._prompts, self._stages, self._split_groups = prompts, stages, config.split_groups
        self._temperature = config.temperature if temperature is None else temperature
        self._lengths = Lengths(config.max_tokens)  # of these rows, from one evaluation to the next

    async def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Listen to the workers. Where there is a loop, it does that."""
        self._stages.begin(tasks)

    def end(self) -> None:
        self._stages.end()

    async def evaluate(self) -> Evaluated:
        """RuntimeError where every reward failed."""
        start_s = now_s()
        prompts = [self._prompts.prompt(uid) for uid in range(self._prompts.num_rows)]
        everyone = await first_failure([self._group(prompt) for prompt in prompts])
        answered = [(prompt, ready) for prompt, ready in zip(prompts, everyone, strict=True) if ready is not None]
        groups = [ready.scored for _, ready in answered]
        if not groups:
            raise RuntimeError(f"evaluation at step {self._stages.step}: every reward failed; the log has each of them")
        metrics = reward_metrics(groups, "eval") | length_metrics(groups, "eval")
        for name in dict.fromkeys(prompt.data_set for prompt, _ in answered if prompt.data_set):
            of_set = [ready.scored for prompt, ready in answered if prompt.data_set == name]
            metrics |= reward_metrics(of_set, f"eval/{name}") | length_metrics(of_set, f"eval/{name}")
        failed = float(len(everyone) - len(groups))
        metrics |= {"eval/prompts": float(len(groups)), "eval/failed": failed, "eval/s": now_s() - start_s}
        return metrics, [{"prompt": prompt.text, "completion": ready.text, "reward": ready.scored.rewards[0]}
                         for prompt, ready in answered[:NUM_ANSWERS]]

    async def _group(self, prompt: Prompt) -> GroupReady | None:
        """The prompt's group, scored; None where its reward failed and the run goes on.

        Its calls to actors have their deadlines in the worker.
        """
        stages, num_parts = self._stages, min(self._split_groups, prompt.num_samples)
        entry = stages.ledger.evaluate(-1 - prompt.uid, stages.step, num_parts)
        stages.evaluated[entry.uid] = asyncio.get_running_loop().create_future()
        stages.generate(entry, replace(prompt, uid=entry.uid), priority=stages.step, lengths=self._lengths,
                        temperature=self._temperature)
        return await stages.evaluated[entry.uid]
