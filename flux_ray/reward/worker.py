"""Scores groups of rollouts.

Takes:  Responses; the config at birth; the actors of reward models.
Gives:  Scores: each function's value, and their weighted sum.
Knows:  how TRL calls a reward function, which is how every function is called here.
Keeps:  the child processes that call users' functions.
Never:  waits longer than reward.deadline_s for one call; guesses a value: a sample whose reward failed has none.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from flux_ray.cluster.group import Actor, Members, Router
from flux_ray.config import PolicyGradientConfig, RewardConfig
from flux_ray.protocols import RewardModelScorer
from flux_ray.records import FAILED, OVERLONG, Responses, Scores
from flux_ray.reward.budget import Budget
from flux_ray.reward.calls import Arguments, Caller, Judged
from flux_ray.reward.registry import GIVEN, RewardFunction, answer_in, find_answer_column, load_functions
from flux_ray.reward.sandboxed import SandboxedRewards, Surroundings
from flux_ray.reward.values import RewardError, Value

REWARD_MODEL_ROLE = "reward_model"
MODEL_DEADLINE_S = 3600.0  # of one call: reward.deadline_s comes first, as long as the model answers nobody
BEGUN_TRAVELS_S = 0.2  # for the answer of `begun_alone` to be out, before users' code may end the process


class RewardWorker:
    """One scoring process's work. Several `score` calls may run at once; functions that aren't async take turns."""

    def __init__(self, config: PolicyGradientConfig, surroundings: Surroundings | None = None) -> None:
        """`surroundings`: of users' functions; none: this process's."""
        self._config = config
        self._children = SandboxedRewards(config, surroundings or Surroundings.here(config.reward))
        self._functions: tuple[RewardFunction, ...] = ()
        self._loading = asyncio.Lock()
        self._models: dict[str, Sequence[Actor[RewardModelScorer]]] = {}  # by the function's name
        self._router: Router[RewardModelScorer] = Router()
        self._num_scored = 0
        self._idle, self._not_alone = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._not_alone.set()
        self._one_alone = asyncio.Lock()
        self._begun: dict[int, asyncio.Event] = defaultdict(asyncio.Event)  # by uid
        self._caller = Caller(self._children, deadline_s=config.reward.deadline_s, retries=config.reward.retries)
        self._budget = Budget(config.reward.max_error_share)
        self._has_told_invalid = False

    async def meet(self, members: Members) -> None:
        """The actors of reward models: replica r of model m is actor m x replicas + r."""
        replicas, actors = self._config.reward.model_replicas, members.of(REWARD_MODEL_ROLE)
        models = [function.name for function in await self._loaded() if function.is_model]
        self._models = {name: actors[m * replicas : (m + 1) * replicas] for m, name in enumerate(models)}

    async def _loaded(self) -> tuple[RewardFunction, ...]:
        async with self._loading:
            if not self._functions:
                self._functions = load_functions(self._config.reward, await self._children.signatures())
        return self._functions

    def close(self) -> None:
        self._children.close()

    async def score(self, responses: Responses) -> Scores:
        """Rewards of the G samples of a group, beside those of other groups."""
        await self._not_alone.wait()
        self._num_scored += 1
        self._idle.clear()
        try:
            return await self._score(responses)
        finally:
            self._num_scored -= 1
            if not self._num_scored:
                self._idle.set()

    async def score_alone(self, responses: Responses) -> Scores:
        """As `score`, once all others are scored; what comes meanwhile waits. For a group that may end the process."""
        async with self._one_alone:
            self._not_alone.clear()
            begun = self._begun[responses.prompt.uid]
            try:
                await self._idle.wait()
                begun.set()
                await asyncio.sleep(BEGUN_TRAVELS_S)
                return await self._score(responses)
            finally:
                self._not_alone.set()
                self._begun.pop(responses.prompt.uid, None)  # tried again, it has to begin again

    async def begun_alone(self, uid: int) -> None:
        """Returns when `score_alone` of that group has the process to itself: who then ends it is that group."""
        await self._begun[uid].wait()

    async def _score(self, responses: Responses) -> Scores:
        """Rewards of the G samples of a group.

        The reward is the weighted sum over the functions that gave a value; nan where none did. A function that gives a
        dict of parts counts with their sum, and each part is kept as NAME/PART; a nan is taken as None, as TRL does.
        A sample for which a function failed (it raised, gave something that is no reward, or took longer than
        reward.deadline_s) has no reward. RewardError where that stops the run, or fewer than two samples are left.
        """
        functions, arguments = await self._loaded(), self._arguments(responses)
        parts: dict[str, np.ndarray] = {}
        failed: dict[int, RewardError] = {}
        size, scored_by = arguments.size, responses.prompt.rewards
        for function in functions:
            if scored_by and function.name not in scored_by:   # of another set: it has nothing to say of this one
                parts[function.name] = np.full(size, np.nan)
            else:
                judged = await self._judged(function, responses, arguments)
                parts |= parts_of(function.name, judged.values)
                failed |= judged.failed
        if failed:
            without(failed, parts, size)
        task = [function for function in functions if not function.is_shaping]
        rewards, task_rewards = weighted_sum(functions, parts, size), weighted_sum(task, parts, size)
        if self._config.reward.overlong_penalty:
            parts[OVERLONG] = overlong(responses.num_loss_tokens, self._config.reward,
                                       longest=responses.prompt.max_tokens or self._config.rollout.max_tokens)
            rewards = rewards + parts[OVERLONG]
        parts |= {name: np.full(size, value) for name, value in arguments.logged.items() if name not in parts}
        self._account(responses, rewards, failed)
        return Scores(rewards, task_rewards, parts)

    def _account(self, responses: Responses, rewards: np.ndarray, failed: dict[int, RewardError]) -> None:
        """Tell of samples without a reward. Raises what failed where the others are too few, UserError where too many
        failed."""
        size, where = len(rewards), responses.prompt.where
        for error in failed.values():
            logging.getLogger(__name__).warning("%s: the sample has no reward", error)
        self._budget.count(size, failed=len(failed), why=str(next(iter(failed.values()), "")))
        num_given = int(np.isfinite(rewards).sum())
        if failed and num_given < min(2, size):
            raise next(iter(failed.values()))
        num_invalid = size - num_given - len(failed)
        if num_invalid and not self._has_told_invalid:
            self._has_told_invalid = True
            logging.getLogger(__name__).warning(
                "%s: no function gave a reward for %d of %d samples (None or nan): they leave the statistics of their "
                "group. This is said once; reward/invalid counts them", where, num_invalid, size)

    def _arguments(self, responses: Responses) -> Arguments:
        """What TRL's GRPOTrainer passes: lists of length G by name, and trainer_state, log_extra, log_metric.

        trainer_state has global_step (of the policy that sampled the group) and max_steps; log_metric's values become
        parts that don't count (one with the name of a part there already is left out); log_extra takes columns for a
        table of completions, which isn't kept here.
        """
        prompt, opening = responses.prompt, self._config.reward.opening or ""
        texts = [opening + text for text in responses.texts]
        completions: list[object] = list(texts)
        if not isinstance(prompt.text, str):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: value for name, value in prompt.columns.items() if name not in GIVEN}
        each: dict[str, Sequence[object]] = {"completions": completions, "completion_ids": responses.response_ids}
        state = {"global_step": responses.step, "max_steps": self._config.driver.num_steps}
        return Arguments(len(texts), {**columns, "prompts": prompt.text}, each, state)

    async def _judged(self, function: RewardFunction, responses: Responses, arguments: Arguments) -> Judged:
        """With reward.on_failure=stop RewardError for the first sample that failed."""
        answer_column = find_answer_column(self._config.data, responses.prompt.columns)
        if answer_column is not None and (function.is_rule or "answer" not in arguments.same):
            answer = answer_in(responses.prompt.columns, answer_column)
            arguments = replace(arguments, same={**arguments.same, "answer": answer})
        model = (lambda: self._ask_model(function.name, responses)) if function.is_model else None
        where = responses.prompt.where
        if self._config.reward.on_failure == "stop":
            return Judged(await self._caller.call(function, arguments, where=where, model=model), {})
        try:
            return await self._caller.judge(function, arguments, where=where, model=model)
        except RewardError as error:
            self._budget.count(arguments.size, failed=arguments.size, why=str(error))
            raise

    async def _ask_model(self, name: str, responses: Responses) -> list[float]:
        """Of the replica with the fewest of this worker's calls."""
        actor = self._router.choose(self._models[name], 1)
        try:
            return await actor.call(RewardModelScorer.scores, responses).within(MODEL_DEADLINE_S)
        finally:
            self._router.done(actor, 1)


def parts_of(name: str, values: Sequence[Value]) -> dict[str, np.ndarray]:
    """A function's values (G,) by part: under its own name, and under NAME/PART where it gave dicts."""
    parts = {name: np.array([value_of(value) for value in values])}
    for part in dict.fromkeys(part for value in values if isinstance(value, dict) for part in value):
        given = [value.get(part) if isinstance(value, dict) else None for value in values]
        parts[f"{name}/{part}"] = np.array([_number(value) for value in given])
    return parts


def without(failed: Collection[int], parts: dict[str, np.ndarray], size: int) -> None:
    """Samples that failed have no value of any function, so that nothing is learned from a part of their reward."""
    has_failed = np.isin(np.arange(size), list(failed))
    for name, values_G in parts.items():
        parts[name] = np.where(has_failed, np.nan, values_G)
    parts[FAILED] = has_failed.astype(np.float64)


def overlong(lengths_G: np.ndarray, reward: RewardConfig, *, longest: int) -> np.ndarray:
    """(G,) float64: the soft penalty, 0 up to L_max - L_cache sampled tokens, then falling in a straight line to
    -reward.overlong_penalty at L_max = `longest`, the set's own or rollout.max_tokens (2503.14476, eq. 13)."""
    cache = min(reward.overlong_span(longest), longest)
    return -reward.overlong_penalty * np.clip((lengths_G - (longest - cache)) / cache, 0.0, 1.0)


def weighted_sum(functions: Sequence[RewardFunction], parts: dict[str, np.ndarray], size: int) -> np.ndarray:
    """(G,) float64: weight times value over the functions that gave one; nan where none did."""
    if not functions:
        return np.full(size, np.nan)
    values_FG = np.stack([parts[function.name] for function in functions])
    weights_F1 = np.array([[function.weight] for function in functions])
    total = np.nansum(weights_F1 * values_FG, axis=0)
    return np.where(np.isnan(values_FG).all(axis=0), np.nan, total)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def value_of(value: Value) -> float:
    """A sample's value: itself, or the sum of its parts (those that are None left out; nan where all are)."""
    if not isinstance(value, dict):
        return _number(value)
    given = [number for number in map(_number, value.values()) if not math.isnan(number)]
    return sum(given) if given else math.nan
