"""Runs a config through TRL's own trainers, in this process.

Takes:  a Config whose paths are set (rewards by name, rows in a file), callbacks.
Gives:  a run folder like ours: config, metrics under our names, the model; a TrainingResult.
Knows:  the form in which TRL takes prompts and rewards and gives metrics.
Never:  needs Ray, vLLM or DeepSpeed; runs a setting that TRL hasn't (`check_trl`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from flux_ray import run_dir
from flux_ray.backends.trl_pairs import make_pair_trainer
from flux_ray.backends.trl_settings import check_trl, opening, trainer_arguments
from flux_ray.config import ClusterConfig, Config, PairsConfig, PolicyGradientConfig
from flux_ray.data import PairSource, PromptSource
from flux_ray.errors import UserError
from flux_ray.model import load_tokenizer, resolve_dtype
from flux_ray.model.stops import stop_token_ids
from flux_ray.observability.callbacks import Callback
from flux_ray.observability.run_folder import LOG, RunFolder
from flux_ray.observability.terminal import quiet
from flux_ray.records import OVERLONG
from flux_ray.reward import SandboxedRewards, Surroundings, ask_signatures, find_answer_column, resolve_functions
from flux_ray.reward.calls import LEFT_OUT, Arguments, Caller
from flux_ray.reward.registry import GIVEN, RewardFunction, answer_in
from flux_ray.reward.worker import overlong, value_of
from flux_ray.rollout.texts import texts_of
from flux_ray.run import TrainingResult
from flux_ray.run.prepare import Prepared, Rollouts, prepare
from flux_ray.run.recorder import Recorder

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

#: TRL's metric ► ours. Any other is trl/NAME.
METRICS = {
    "reward": "reward/mean", "loss": "actor/loss", "kl": "actor/grpo_kl", "entropy": "actor/entropy",
    "clip_ratio/region_mean": "actor/clip_frac", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
    "completions/mean_length": "rollout/response_length_mean",
    "completions/max_length": "rollout/response_length_max", "completions/clipped_ratio": "rollout/truncated_frac",
}

Result = TypeVar("Result")

#: (config, device) ► the policy, where another library opens it
LoadModel = Callable[[Config, str], "PreTrainedModel"]


def require(package: str, *, backend: str, install: str) -> None:
    """UserError where a package isn't installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"backend={backend} needs the {package} package: {install}")


def train(config: Config, *, callbacks: Sequence[Callback] = (), load_model: LoadModel | None = None) -> TrainingResult:
    """Train as the config says. UserError: trl isn't installed, or can't run the config."""
    require("trl", backend="trl", install="pip install 'flux-ray[trl]'")
    config, differences = check_trl(config)
    prepared = prepare(config)
    if not isinstance(prepared.task, Rollouts) and not isinstance(prepared.task.train, PairSource):
        raise UserError(f"backend=trl: {prepared.task.train.source}: groups with given rewards aren't there: it "
                        "rolls out by itself")
    config = run_dir.claim(prepared.config)
    assert config.run_dir is not None
    with run_dir.held(config.run_dir):
        return _recorded(config, prepared, differences, callbacks, load_model)


def _recorded(
    config: Config, prepared: Prepared, differences: Sequence[str], callbacks: Sequence[Callback],
    load_model: LoadModel | None,
) -> TrainingResult:
    """Train, in a run's folder that nobody else writes to."""
    folder = RunFolder(str(config.run_dir))
    folder.create(config, resume_step=None)
    with contextlib.ExitStack() as ending, quiet(folder.path / LOG, progress=config.observability.progress) as terminal:
        recorder = Recorder(config, folder=folder, terminal=terminal, callbacks=callbacks)
        for warning in (*prepared.warnings, *differences):
            recorder.warn(warning)
        try:
            trainer = _trainer(config, prepared, recorder, load_model, ending)
            trainer.train()
            trainer.model.to(resolve_dtype(config.model.dtype, _device(config.cluster)))  # as it would be served
            trainer.save_model(str(folder.model))
        except BaseException as error:
            recorder.ended("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
            raise
        recorder.ended("done")
        terminal.say(f"done: model in {folder.model}")
    history = tuple(recorder.history)
    return TrainingResult(folder.path, config.driver.num_steps, history[-1] if history else {}, history)


def _trainer(config: Config, prepared: Prepared, recorder: Recorder, load_model: LoadModel | None,
             ending: contextlib.ExitStack) -> Trainer:
    if isinstance(prepared.task, Rollouts):
        assert isinstance(config, PolicyGradientConfig)
        return make_trainer(config, prepared.task.train, recorder=recorder, load_model=load_model, ending=ending)
    assert isinstance(prepared.task.train, PairSource) and isinstance(config, PairsConfig)
    device = _device(config.cluster)
    model = str(config.model.path) if load_model is None else load_model(config, device)
    return make_pair_trainer(config, prepared.task.train, recorder=recorder, model=model, device=device)


def _device(config: ClusterConfig) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"


def make_trainer(
    config: PolicyGradientConfig, prompts: PromptSource, *, recorder: Recorder, load_model: LoadModel | None = None,
    ending: contextlib.ExitStack | None = None,
) -> Trainer:
    """TRL's trainer, ready to train. The rewards' processes end with `ending`, or else with this process."""
    import trl
    from datasets import Dataset

    if any(one.data_set.rewards for one in prompts.sets):
        raise UserError("backend=trl has no rewards of a set's own: leave them out of data.train, or use backend=ray")
    if any(one.data_set.max_tokens for one in prompts.sets):
        raise UserError("backend=trl has no max_tokens of a set's own: leave it out of data.train, or use backend=ray")
    device = _device(config.cluster)
    kind, arguments = ((trl.RLOOTrainer, trl.RLOOConfig) if config.algo.name == "rloo"
                       else (trl.GRPOTrainer, trl.GRPOConfig))
    settings = trainer_arguments(config, longest_prompt=prompts.longest_prompt, device=device)
    if load_model is None:
        settings["model_init_kwargs"] = opening(config)
    functions = resolve_functions(config.reward, config.data, prompts.columns, ask_signatures(config))
    _refuse_left_out(functions, prompts)
    weights = [function.weight for function in functions]
    tokenizer = load_tokenizer(config.model.tokenizer or str(config.model.path))
    calling = Calling(config, tokenizer)
    if ending is not None:
        ending.callback(calling.close)
    rewards = [as_trl(function, config, calling) for function in functions]
    if config.reward.overlong_penalty:
        rewards, weights = [*rewards, _overlong_reward(config)], [*weights, 1.0]
    return kind(
        model=config.model.path if load_model is None else load_model(config, device),
        args=arguments(output_dir=str(Path(str(config.run_dir), "trl")), reward_weights=weights, **settings),
        reward_funcs=rewards,
        train_dataset=Dataset.from_list(rows(prompts, config.driver.num_steps * config.batch.prompts_per_step)),
        processing_class=tokenizer,
        callbacks=[_recording(recorder, updates_per_step=config.algo.epochs * config.algo.mini_batches)],
    )


def _refuse_left_out(functions: Sequence[RewardFunction], prompts: PromptSource) -> None:
    for function in functions:
        for name in LEFT_OUT & set(function.parameters) & set(prompts.columns):
            raise UserError(f"backend=trl: reward {function.name} takes the column {name!r}, which TRL leaves out: "
                            "give it another name in the data")


def rows(prompts: PromptSource, number: int) -> list[dict[str, object]]:
    """The prompts that a run of ours draws, in its order: the prompt in TRL's form, and the columns for the rewards.

    One epoch has all of the run: TRL leaves out a rest at the end of an epoch, even if there is nothing else.
    """
    drawn = [prompts.prompt(uid) for uid in range(number)]
    left_out = LEFT_OUT | GIVEN
    return [{**{k: v for k, v in p.columns.items() if k not in left_out}, "prompt": p.text} for p in drawn]


class Calling:
    """Calls rewards as our workers do, on an event loop beside TRL's thread."""

    def __init__(self, config: PolicyGradientConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._end_ids = stop_token_ids(config.model.path, tokenizer)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        self._children, self._caller = self._await(_caller(config))

    def __call__(self, function: RewardFunction, arguments: Arguments) -> list[Any]:
        return self._await(self._caller.call(function, arguments, where="a batch of prompts"))

    def completions(self, prompts: Sequence[object], ids: list[list[int]]) -> list[str | list[dict[str, str]]]:
        """The responses as our rewards see them: TRL's own texts are without any special token."""
        texts = texts_of([np.array(one, np.int64) for one in ids], self._tokenizer, end_ids=self._end_ids,
                         skip_special_tokens=self._config.rollout.skip_special_tokens)
        texts = [(self._config.reward.opening or "") + text for text in texts]
        return [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)]

    def close(self) -> None:
        """End the rewards' processes, and the loop."""
        self._loop.call_soon_threadsafe(self._children.close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _await(self, coroutine: Coroutine[object, object, Result]) -> Result:
        """The result. The call has its own deadline, on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _caller(config: PolicyGradientConfig) -> tuple[SandboxedRewards, Caller]:
    children = SandboxedRewards(config, Surroundings.here(config.reward))
    return children, Caller(children, deadline_s=config.reward.deadline_s, retries=config.reward.retries)


def as_trl(
    function: RewardFunction, config: PolicyGradientConfig, calling: Calling
) -> Callable[..., list[float | None]]:
    """The function in TRL's form, with its own name, options, deadline and answer column."""

    def reward(prompts: list[object], completions: list[object], **given: Any) -> list[float | None]:
        columns = {name: values for name, values in given.items() if name not in GIVEN}
        answer_column = find_answer_column(config.data, columns)
        if answer_column is not None and (function.is_rule or "answer" not in columns):
            rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
            columns["answer"] = [answer_in(row, answer_column) for row in rows]
        ids = [list(map(int, one)) for one in given["completion_ids"]]
        each = {**columns, "prompts": prompts, "completions": calling.completions(prompts, ids), "completion_ids": ids}
        state = {name: getattr(given.get("trainer_state"), name, None) for name in ("global_step", "max_steps")}
        arguments = Arguments(len(completions), {}, each, state)
        values = [value_of(value) for value in calling(function, arguments)]
        for name, value in arguments.logged.items():
            given.get("log_metric", _ignored)(name, value)
        return [None if np.isnan(value) else value for value in values]

    reward.__name__ = function.name
    return reward


def _ignored(name: str, value: float) -> None:
    """In place of a log_metric that TRL doesn't give."""


def _overlong_reward(config: PolicyGradientConfig) -> Callable[..., list[float | None]]:
    def reward(completion_ids: list[Any], **_: Any) -> list[float | None]:
        lengths_G = np.array([len(ids) for ids in completion_ids])
        return overlong(lengths_G, config.reward, longest=config.rollout.max_tokens).tolist()

    reward.__name__ = OVERLONG
    return reward


def _recording(recorder: Recorder, *, updates_per_step: int) -> TrainerCallback:
    """Records TRL's logs as steps of our run."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        def on_log(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
            logs: dict[str, float] | None = None, **_: object,
        ) -> None:
            if logs and "reward" in logs:  # the last log of a training has only totals
                ours = {METRICS.get(name, f"trl/{name}"): float(value) for name, value in logs.items()}
                recorder.step(state.global_step // updates_per_step - 1, ours)
                control.should_training_stop |= recorder.control.take("stop") is not None

    return Recording()


