"""An evaluation: every prompt of eval.data, once, under the weights that the engines serve.

Takes:  the evaluation's prompts, the stages.
Gives:  eval/mean and its parts, lengths, pass@k, and the first answers as text; of several sets, eval/NAME/... too.
Knows:  it runs between steps; where generation is asynchronous, prompts of later steps go on beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from flux_ray.clock import now_s
from flux_ray.cluster.group import first_failure
from flux_ray.config import RolloutConfig, RolloutEvalConfig
from flux_ray.data import PromptSource
from flux_ray.driver.stages import Stages
from flux_ray.messages import GroupReady
from flux_ray.observability.eval_metrics import sample_metrics
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import Lengths

NUM_ANSWERS = 16  # answers kept as text, for people

#: Metrics; prompt, completion and reward of the first prompts.
Evaluated = tuple[dict[str, float], list[dict[str, object]]]


class Evaluation:
    def __init__(self, config: RolloutConfig, options: RolloutEvalConfig, prompts: PromptSource, stages: Stages, *,
                 most_answers: int | None = NUM_ANSWERS) -> None:
        """`most_answers` are given as text; None: all."""
        self._prompts, self._stages, self._split_groups = prompts, stages, config.split_groups
        self._temperature = config.temperature if options.temperature is None else options.temperature
        self._correct_at, self._most_answers = options.correct_at, most_answers
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
        if not answered:
            raise RuntimeError(f"evaluation at step {self._stages.step}: every reward failed; the log has each of them")
        metrics = self._measured([ready for _, ready in answered], "eval")
        for name in dict.fromkeys(prompt.data_set for prompt, _ in answered if prompt.data_set):
            metrics |= self._measured([ready for prompt, ready in answered if prompt.data_set == name], f"eval/{name}")
        failed = float(len(everyone) - len(answered))
        metrics |= {"eval/prompts": float(len(answered)), "eval/failed": failed, "eval/s": now_s() - start_s}
        return metrics, [_shown(prompt, ready) for prompt, ready in answered[: self._most_answers]]

    def _measured(self, ready: Sequence[GroupReady], prefix: str) -> dict[str, float]:
        groups = [one.scored for one in ready]
        return (reward_metrics(groups, prefix) | length_metrics(groups, prefix)
                | sample_metrics(groups, [one.texts for one in ready], prefix, correct_at=self._correct_at))

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


def _shown(prompt: Prompt, ready: GroupReady) -> dict[str, object]:
    """The prompt with its first answer, and what each answer was worth."""
    scored = ready.scored
    return {"row": prompt.row, **({"set": prompt.data_set} if prompt.data_set else {}), "prompt": prompt.text,
            "completion": ready.texts[0], "reward": scored.rewards[0], "task_rewards": scored.task_rewards.tolist()}
