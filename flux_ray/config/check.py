"""Which values of a config go together, as far as the values alone tell.

Gives:  `validate`: the config itself, or a UserError that names key and value; `check_values`, for what starts nothing;
        `check_data`, for a data set.
Never:  looks at an algorithm (flux_ray.algo.check does), a file, a model or a cluster.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator

from flux_ray.config.knobs import check_value, default_of, options_of, value_of
from flux_ray.config.objectives import (
    C,
    Config,
    EvaluatedConfig,
    LossConfig,
    PairsConfig,
    PolicyGradientConfig,
    PPOConfig,
    ReferencedConfig,
)
from flux_ray.config.sections import DataConfig, EvalConfig, LoraConfig, ReferenceConfig
from flux_ray.errors import UserError


def validate(config: C) -> C:
    """The config itself, once every check that values alone allow has passed."""
    for problem in _missing(config):
        raise UserError(problem)
    return check_values(config)


def check_values(config: C) -> C:
    """`validate` without what only a run needs: a model and data."""
    for key, f in options_of(type(config)):
        check_value(key, value_of(config, key), f)
    for problem in _problems(config):
        raise UserError(problem)
    return config


def check_data(config: C) -> C:
    """`check_values` of the section `data` alone: a set has one of its own."""
    for key, f in options_of(type(config)):
        if key.startswith("data."):
            check_value(key, value_of(config, key), f)
    for problem in _data_problems(config.data):
        raise UserError(problem)
    return config


def _missing(config: Config) -> Iterator[str]:
    if not config.model.path:
        yield "model.path is missing: the policy to train, a local folder or a hub name (model.path=...)"
    if not config.data.train:
        yield "data.train is missing: the prompts to train on, a file or a hub data set (data.train=...)"


def _problems(config: Config) -> Iterator[str]:
    """What is wrong between values, the most basic first."""
    yield from _batch_problems(config)
    betas = config.train.adam_betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"train.adam_betas must be two numbers in [0, 1), got {betas}"
    yield from _lora_problems(config)
    if isinstance(config, PolicyGradientConfig):
        yield from _rollout_problems(config)
    if isinstance(config, PairsConfig):
        yield from _pair_problems(config)
    yield from _data_problems(config.data)
    if isinstance(config, EvaluatedConfig):
        yield from _evaluation_problems(config.eval)
    yield from _best_problems(config)
    below = [step for step in config.observability.trace_steps if step < 0]
    if below:
        yield f"observability.trace_steps={below} counts from the end: steps have numbers from 0, as in metrics.jsonl"


def _data_problems(data: DataConfig) -> Iterator[str]:
    template = data.prompt_template
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        yield f"data.prompt_template {template!r}: {error} (write a brace twice to keep it)"
        return
    if template is not None and not fields:
        yield (f"data.prompt_template={template!r} has no {{prompt}}: every prompt would be this text (what goes "
               "before a chat is data.system_prompt)")
    if "" in fields:
        yield f"data.prompt_template={template!r}: name what goes into {{}}: {{prompt}}, or a column"


def _evaluation_problems(evaluation: EvalConfig) -> Iterator[str]:
    if evaluation.every and not evaluation.data and not evaluation.share:
        yield f"eval.every={evaluation.every} needs eval.data: the prompts to evaluate on (or eval.share)"
    if evaluation.patience and not evaluation.every:
        yield f"eval.patience={evaluation.patience} needs eval.every: the steps between the evaluations that it counts"
    if evaluation.data and evaluation.share:
        yield f"eval.share={evaluation.share:g} beside eval.data={evaluation.data}: give one of them"


def _best_problems(config: Config) -> Iterator[str]:
    best = config.checkpoint.best
    if best is None:
        if isinstance(config, EvaluatedConfig) and config.eval.patience:
            yield (f"eval.patience={config.eval.patience} needs checkpoint.best: the metric that is to get better, as "
                   "checkpoint.best=eval/task_mean or -eval/loss")
        return
    if not best.removeprefix("-").startswith("eval/"):
        yield f"checkpoint.best={best} must be a metric of evaluations: eval/..., or -eval/... where the least is best"
    if not isinstance(config, EvaluatedConfig) or not (config.eval.data or config.eval.share):
        yield f"checkpoint.best={best} needs evaluations: eval.data and eval.every"


def _batch_problems(config: Config) -> Iterator[str]:
    prompts, ranks = config.batch.prompts_per_step, config.train.num_ranks
    updates = config.algo.mini_batches if isinstance(config.algo, LossConfig) else 1
    if prompts % updates:
        yield (f"batch.prompts_per_step={prompts} must be divisible by algo.mini_batches={updates}: "
               "every update of a step takes equally many")
    if prompts // updates % ranks:
        share = f" / algo.mini_batches={updates} = {prompts // updates}" if isinstance(config.algo, LossConfig) else ""
        yield (f"batch.prompts_per_step={prompts}{share} must be divisible by train.num_ranks={ranks}: every rank "
               "takes equally many, and a group is never split over ranks")


def _rollout_problems(config: PolicyGradientConfig) -> Iterator[str]:
    reward, rollout, evaluation = config.reward, config.rollout, config.eval
    if reward.weights and len(reward.weights) != len(reward.functions):
        yield f"reward.weights={reward.weights} must be as many as reward.functions={reward.functions}"
    if config.algo.icepop_low >= config.algo.icepop_high:
        yield f"algo.icepop_low={config.algo.icepop_low} must be < algo.icepop_high={config.algo.icepop_high}"
    context, response = rollout.max_model_len, rollout.max_tokens
    if context is not None and context <= response:
        yield f"rollout.max_model_len={context} must be > rollout.max_tokens={response}: the prompt needs room too"
    if evaluation.stop_at is not None and not evaluation.every:
        yield f"eval.stop_at={evaluation.stop_at} needs eval.every: the steps between the evaluations that it looks at"
    if evaluation.temperature == 0 and evaluation.num_samples > 1:
        yield f"eval.num_samples={evaluation.num_samples} needs eval.temperature > 0: at 0 all samples are the same"
    if isinstance(config, PPOConfig) and config.critic.warmup_steps >= config.driver.num_steps:
        yield (f"critic.warmup_steps={config.critic.warmup_steps} must be < "
               f"driver.num_steps={config.driver.num_steps}: the policy would never learn")


def _pair_problems(config: PairsConfig) -> Iterator[str]:
    algo = config.algo
    if not algo.beta:
        yield f"algo.beta must be > 0 for {algo.name}, where it is the scale of the implicit reward; got {algo.beta}"
    if algo.reference_free and config.reference.path:
        yield f"reference.path={config.reference.path} beside algo.reference_free=true: nothing would ask it"


def _lora_problems(config: Config) -> Iterator[str]:
    lora = config.train.lora
    if not lora.rank:
        given = [f"train.lora.{f.name}={getattr(lora, f.name)}" for f in dataclasses.fields(LoraConfig)
                 if getattr(lora, f.name) != default_of(f)]
        if given:
            yield f"{given[0]} is read with train.lora.rank > 0 alone, which is 0"
        return
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        yield f"train.lora.targets must be all-linear or endings of layers' names, e.g. [q_proj,v_proj]; got {targets}"
    if isinstance(config, ReferencedConfig) and config.reference.path is None:
        given = [f"reference.{name}={getattr(config.reference, name)}" for name in ("num_actors", "dtype")
                 if getattr(config.reference, name) != getattr(ReferenceConfig(), name)]
        if given:
            yield (f"{given[0]} beside train.lora.rank={lora.rank}: the reference is the policy without its adapter, "
                   "in the training ranks; give reference.path for reference actors")
