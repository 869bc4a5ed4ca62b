"""An evaluation: every prompt of eval.data, once, under the weights that the engines serve.

Takes:  the evaluation's prompts, the stages.
Gives:  eval/mean and its parts, lengths, pass@k, maj@k, intervals, and every answer; of several sets, eval/NAME/... of
        each too.
Knows:  it runs between steps; where generation is asynchronous, prompts of later steps go on beside it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from flux_ray.clock import now_s
from flux_ray.cluster.group import first_failure
from flux_ray.config import PolicyGradientConfig
from flux_ray.data import PromptSource
from flux_ray.driver.stages import Stages
from flux_ray.messages import GroupReady
from flux_ray.observability.described import Described
from flux_ray.observability.eval_metrics import EvaluatedPrompt, by_prompt, eval_metrics
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import Lengths

#: Metrics; a line for each prompt, as EvaluatedPrompt has it.
Evaluated = tuple[dict[str, float], list[dict[str, object]]]

METRICS = (
    Described("eval/prompts", "prompts that were scored", "prompt", "the evaluation"),
    Described("eval/failed", "prompts whose reward failed (`reward.on_failure=drop`)", "prompt", "the evaluation", "0",
              "`run.log` has what the reward function raised"),
    Described("eval/s", "time of the evaluation", "s"),
    Described("eval/pass@K", "chance that one of K samples of a prompt at least is right, unbiased (2107.03374, eq. "
              "1); with `eval.num_samples` above 1", "1", "the prompts"),
    Described("eval/maj@K", "chance that the answer which most of K samples give is right; the same", "1",
              "the prompts"),
    Described("eval/NAME_low", "lower end of the 95 % interval of that mean, by drawing prompts again", "as NAME",
              "the prompts"),
    Described("eval/NAME_high", "upper end of the same", "as NAME", "the prompts"),
    Described("eval/perplexity", "e to the power of `eval/loss`, of completions", "1", "tokens of the completions"),
)


class Evaluation:
    def __init__(self, config: PolicyGradientConfig, prompts: PromptSource, stages: Stages) -> None:
        rollout, settings = config.rollout, config.eval
        self._prompts, self._stages, self._split_groups = prompts, stages, rollout.split_groups
        self._temperature = rollout.temperature if settings.temperature is None else settings.temperature
        self._pass_reward = settings.pass_reward
        self._lengths = Lengths(rollout.max_tokens)  # of these rows, from one evaluation to the next

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
        answered = [EvaluatedPrompt(prompt, ready.texts, ready.scored)
                    for prompt, ready in zip(prompts, everyone, strict=True) if ready is not None]
        if not answered:
            raise RuntimeError(f"evaluation at step {self._stages.step}: every reward failed; the log has each of them")
        metrics, lines = await asyncio.to_thread(self._measured, answered)   # beside generation for later steps
        failed = float(len(everyone) - len(answered))
        metrics |= {"eval/prompts": float(len(answered)), "eval/failed": failed, "eval/s": now_s() - start_s}
        return metrics, lines

    def _measured(self, answered: list[EvaluatedPrompt]) -> Evaluated:
        """Metrics of all of them, and of each set where sets have names; a line for each."""
        values = by_prompt(answered, pass_reward=self._pass_reward)
        sets = {"eval": list(range(len(answered)))}
        for place, one in enumerate(answered):
            if one.prompt.data_set:
                sets.setdefault(f"eval/{one.prompt.data_set}", []).append(place)
        metrics: dict[str, float] = {}
        for prefix, places in sets.items():
            groups = [answered[place].scored for place in places]
            metrics |= reward_metrics(groups, prefix) | length_metrics(groups, prefix)
            metrics |= eval_metrics({name: [each[p] for p in places] for name, each in values.items()}, prefix)
        lines = [one.line | {"values": {name: each[place] for name, each in values.items()}}
                 for place, one in enumerate(answered)]
        return metrics, lines

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
