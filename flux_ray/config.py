"""Every knob and every default, once.

Takes:  plain values (Hydra's overrides, a YAML file, a Python dict).
Gives:  one frozen Config; `from_dict`, `to_dict`; `options()`, every option with its default and meaning.
Knows:  what a value may be by itself and beside the others (`validate`): a ValueError names key and value.
Never:  touches a file (its presets aside), a model or a cluster: what they alone can tell is checked by who opens them.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flux_ray import names
from flux_ray.errors import UserError

#: Presets and experiments: the repository's conf/, which the wheel holds as flux_ray/conf.
CONF = Path(__file__).parent / "conf"


def knob(default: Any, meaning: str, *, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A config field: default, meaning (units included), what may be chosen, bounds (least, above, most)."""
    metadata = {"help": meaning, "choices": choices, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass(frozen=True)
class DataConfig:
    train: Any = knob(None, "prompts to train on: a file, folder or glob, a hub data set (NAME or NAME:SUBSET), a list "
                      "of these, or several sets {NAME: {path: ..., weight: ..., an option of data: ...}}")
    split: str = knob("train", "split to train on, of a hub data set or a folder with splits")
    prompt_column: str = knob("prompt", "column that holds the prompt: a text, or a list of chat messages")
    completion_column: str = knob("completion", "column that holds the completion to learn (algo=sft)")
    learn_turns: str = knob("last", "turns of a chat that are learned: the assistant's last one, or all of its "
                            "(algo=sft)", choices=("last", "all"))
    margin_column: str = knob("margin", "column of pairs that holds how much better chosen is (algo=reward_model); "
                              "may be absent: 0")
    answer_column: str = knob("answer", "column that the built-in rewards compare a completion with; where the data "
                             "have no such column: solution or label")
    system_prompt: str | None = knob(None, "system message put before every chat prompt that has none of its own")
    prefill: bool = knob(False, "a prompt whose last message is the assistant's is gone on with; else that message is "
                         "left out")
    chat_template_kwargs: dict[str, Any] = knob({}, "what the chat template gets beside the messages, e.g. "
                                                "chat_template_kwargs.enable_thinking=false")
    as_chat: bool = knob(False, "wrap a plain text prompt as a user message and apply the chat template")
    prompt_template: str | None = knob(None, "text around a plain prompt, which goes where {prompt} is; {COLUMN} is "
                                      "that column's cell")
    max_prompt_tokens: int | None = knob(None, "longest prompt in tokens; none: what the context leaves", least=1)
    on_bad_row: str = knob("stop", "what a bad row does: stop the run at start, or be skipped and counted",
                           choices=("stop", "skip"))
    shuffle: bool = knob(True, "draw the rows of each epoch in a new order (from the seed)")
    max_rows: int | None = knob(None, "use only the first rows of a set", least=1)
    curriculum: str = knob("none", "order of the rows within an epoch, by data.pass_rate_column: easy_first, or "
                           "unsure_first (those soonest whose rewards vary most)",
                           choices=("none", "easy_first", "unsure_first"))
    pass_rate_column: str = knob("pass_rate", "column that holds how often the policy was right, 0 to 1 "
                                 "(data.curriculum)")


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = knob(None, "the policy: a local folder or a hub name that transformers and vLLM load")
    tokenizer: str | None = knob(None, "the tokenizer, where it isn't beside the model")
    dtype: str = knob("auto", "type of weights and activations; auto: bfloat16 on GPUs, float32 on CPU",
                      choices=("auto", "float32", "bfloat16"))
    attention: str = knob("auto", "transformers' attention implementation; auto: torch_varlen (torch's flash kernels) "
                          "for varlen, else sdpa on GPUs, causal_blocks (ours, for CPUs) elsewhere")
    layout: str = knob("auto", "how a micro-batch lies in memory: padded rows, one row with a block-diagonal mask, "
                       "or varlen (one row, GPUs from Ampere on, bf16); auto: varlen where it can be, else padded",
                       choices=("auto", "padded", "block_diagonal", "varlen"))
    logprob_chunk_tokens: int = knob(1024, "tokens whose logits are held at once: no batch x vocabulary tensor",
                                     least=1)


@dataclass(frozen=True)
class RolloutConfig:
    num_engines: int = knob(1, "vLLM engines, one placement group each", least=1)
    num_workers: int | None = knob(None, "rollout workers: processes that carry groups from prompt to scored; none: "
                                   "one for every 8 engines", least=1)
    tensor_parallel_size: int = knob(1, "GPUs of one engine", least=1)
    group_size: int = knob(4, "G: responses per prompt", least=1)
    max_tokens: int = knob(256, "longest response in tokens (over all turns of a rollout)", least=1)
    ignore_eos: bool = knob(False, "go on past the end token up to max_tokens (benchmarks)")
    temperature: float = knob(1.0, "sampling temperature; log-probs everywhere are those of the distribution sampled",
                              above=0)
    top_p: float = knob(1.0, "nucleus sampling; below 1 refused for ratio losses unless allow_truncated_sampling",
                        above=0, most=1)
    top_k: int = knob(0, "0: all tokens; above 0 it is refused for ratio losses unless allow_truncated_sampling",
                      least=0)
    min_p: float = knob(0.0, "least probability relative to the likeliest; above 0 as top_p", least=0, most=1)
    allow_truncated_sampling: bool = knob(False, "train although top_p, top_k or min_p alter the distribution sampled")
    stop: list[str] = knob([], "texts that end a response")
    skip_special_tokens: bool = knob(False, "leave special tokens out of the texts that rewards see; those that end or "
                                     "fill a text are left out all the same")
    function: str = knob("single_turn", "the rollout: single_turn, a registered name, or path/to/file.py:function")
    kv_after_update: str = knob("recompute", "running requests after new weights: recompute their KV (exact) or keep",
                                choices=("recompute", "keep"))
    max_model_len: int | None = knob(None, "context in tokens; none: the model's own", least=1)
    kv_cache_gib: float = knob(1.0, "KV cache of an engine on CPU, in GiB (GPU: "
                               "rollout.engine_args.gpu_memory_utilization)", above=0)
    max_num_seqs: int = knob(256, "sequences that an engine runs at once", least=1)
    split_groups: int = knob(1, "requests that a group is split into, each on the engine that has least to do; a "
                             "sample has the same seed on any of them (rollout.function sees the part)", least=1)
    deadline_s: float = knob(600.0, "longest wait for one group, in seconds", above=0)
    engine_args: dict[str, Any] = knob({}, "any further option of vLLM's AsyncEngineArgs")


@dataclass(frozen=True)
class RewardConfig:
    functions: list[str] = knob([], "rewards: rules (exact_match, numeric, numeric_or_exact, math, regex or format, "
                                "length, repetition), registered names, path/to/file.py:function, "
                                "package.module:function or model:PATH (a reward model); none with an answer column: "
                                "numeric_or_exact")
    weights: list[float] = knob([], "one weight per function; none: 1 each")
    combine: str = knob("sum", "several functions: sum (weighted, then the algorithm's advantage), or each (each one "
                        "normalised alone over its group, then weighted; algo.normalize_by_std divides no more)",
                        choices=("sum", "each"))
    overlong_penalty: float = knob(0.0, "soft penalty on length, reached at rollout.max_tokens (task rewards don't "
                                   "have it); 0: none", least=0)
    overlong_tokens: int | None = knob(None, "last tokens of rollout.max_tokens over which it rises from 0; none: a "
                                       "fifth of them", least=1)
    options: dict[str, Any] = knob({}, "arguments of a function by its name, e.g. options.regex.pattern='#### ...'")
    opening: str | None = knob(None, "what the chat template begins the answer with, e.g. <think>: rewards see it "
                               "before each completion, with the blanks after it")
    env: list[str] = knob([], "environment variables that your own functions see, by name, e.g. [JUDGE_API_KEY]; their "
                          "values are those where the run is started, and are written nowhere")
    num_workers: int = knob(1, "processes that score", least=1)
    model_replicas: int = knob(1, "actors of each reward model", least=1)
    model_tokens_per_forward: int = knob(8192, "tokens of one forward pass of a reward model", least=1)
    deadline_s: float = knob(60.0, "longest time one call of one function may take, in seconds", above=0)
    on_failure: str = knob("stop", "a function that raises or times out: stop the run, or drop the group and count it",
                           choices=("stop", "drop"))


@dataclass(frozen=True)
class FilterConfig:
    reward: str | None = knob(None, "drop a group whose samples all have this reward alike and draw another prompt: "
                              "task (all rewards but shaping), or a function's name; none: keep every group")
    max_batches: int = knob(10, "batches of prompts that one step may draw, dropped groups of any cause included, "
                            "before the run stops", least=1)
    oversample: float = knob(0.0, "spare prompts in flight for each group that may yet be dropped: they take its place "
                             "without a second round; what the batch had no need of starts again. With max_staleness "
                             "> 0 groups of the next batches stand in, and there are none",
                             least=0)


@dataclass(frozen=True)
class ReferenceConfig:
    path: str | None = knob(None, "the frozen policy; none: the policy's own start")
    num_actors: int = knob(1, "replicas (only where a KL is asked for)", least=1)
    dtype: str = knob("auto", "auto: the policy's", choices=("auto", "float32", "bfloat16"))
    max_tokens_per_forward: int = knob(8192, "tokens of one forward pass", least=1)
    deadline_s: float = knob(600.0, "longest wait for one group, in seconds", above=0)


@dataclass(frozen=True)
class AlgoConfig:
    name: str = knob("grpo", "the algorithm: a choice of the group algo, or the name of what a plugin registers")
    estimator: str | None = knob(None, "advantage estimator; none: the algorithm's own")
    policy_loss: str | None = knob(None, "policy loss; none: the algorithm's own")
    clip_range: float = knob(0.2, "epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon]", above=0)
    clip_range_high: float | None = knob(None, "upper epsilon; none: clip_range", above=0)
    dual_clip: float | None = knob(None, "c > 1: where A < 0 a term is at least c x A, whatever the ratio; none: off",
                                   above=1)
    beta: float = knob(0.01, "weight of the KL to the reference in the loss; 0: no KL there (pairs: the scale of the "
                       "implicit reward)", least=0)
    kl_coef: float = knob(0.0, "weight of the KL to the reference in the reward; 0: no KL there", least=0)
    kl_target: float | None = knob(None, "adapt kl_coef until a sequence's KL in the reward is this, in nats; none: "
                                   "fixed", above=0)
    kl_horizon: float = knob(10_000.0, "sequences over which an adapted kl_coef moves by its error", above=0)
    kl_estimator: str = knob("k3", "estimator of the KL in the loss (k1 has no useful gradient there: refused)",
                             choices=("k1", "k2", "k3"))
    entropy_coef: float = knob(0.01, "weight of the entropy bonus", least=0)
    normalize_by_std: bool = knob(True, "divide a group's advantages by its standard deviation")
    reference_free: bool = knob(False, "pairs: no reference model, as if one held all responses equally likely")
    pair_logprobs: str = knob("sum", "ipo: a response's log-prob is the sum over its tokens, or their mean",
                              choices=("sum", "mean"))
    label_smoothing: float = knob(0.0, "cdpo: probability that a pair's label is wrong", least=0, most=0.5)
    aggregation: str | None = knob(None, "how tokens weigh in the loss; none: the algorithm's own",
                                   choices=("token_mean", "sequence_mean", "constant_length", "sequence"))
    old_logprobs: str = knob("trainer", "the denominator of the ratio: the trainer's old policy, or the sampler's",
                             choices=("trainer", "sampler"))
    off_policy: str = knob("none", "correction of trainer against sampler: none, tis (truncated) or icepop (masked)",
                           choices=("none", "tis", "icepop"))
    off_policy_level: str = knob("token", "form of that correction", choices=("token", "sequence"))
    tis_cap: float = knob(2.0, "C of tis: the weight is min(ratio, C)", above=0)
    icepop_low: float = knob(0.5, "icepop: below it the weight is 0", least=0)
    icepop_high: float = knob(5.0, "icepop: above it the weight is 0", above=0)
    gamma: float = knob(1.0, "discount of later rewards per token (gae)", least=0, most=1)
    gae_lambda: float = knob(0.95, "weight of later errors of the critic's values (gae); 1: returns less values",
                             least=0, most=1)
    whiten_advantages: bool = knob(True, "advantages over the batch's loss tokens get mean 0 and deviation 1 (gae)")
    epochs: int = knob(1, "passes over a batch", least=1)
    mini_batches: int = knob(1, "optimizer updates per pass", least=1)
    mask_truncated: bool = knob(False, "truncated responses leave the loss (they stay in their group's statistics), "
                                "except under reward.overlong_penalty, which they would not learn from")
    options: dict[str, Any] = knob({}, "further arguments for a registered estimator or loss")


@dataclass(frozen=True)
class CriticConfig:
    """Of algorithms whose advantages need values; it trains as train says, and on as many ranks."""

    path: str | None = knob(None, "where it starts: a policy or a reward model; none: the policy's own start")
    learning_rate: float = knob(1e-5, "peak learning rate (AdamW), on train's schedule", least=0)
    clip_range: float = knob(0.2, "a value may move so far from its old one within a step before it stops learning",
                             above=0)
    warmup_steps: int = knob(0, "first steps, in which it learns alone and the policy stays as it is", least=0)


@dataclass(frozen=True)
class BatchConfig:
    prompts_per_step: int = knob(32, "prompts of one training step (algo=sft: samples; preferences: pairs)", least=1)
    max_tokens_per_micro_batch: int = knob(8192, "token budget of one micro-batch, padding included", least=1)
    micro_batch_size: int | None = knob(None, "most samples of one micro-batch; none: the token budget alone", least=1)


@dataclass(frozen=True)
class LoraConfig:
    rank: int = knob(0, "rank r of the two factors beside each adapted weight (LoRA); 0: all weights are trained",
                     least=0)
    alpha: float = knob(16.0, "the factors' product is added to the weight times alpha / rank", above=0)
    dropout: float = knob(0.0, "share of an adapter's inputs that training drops", least=0, most=0.99)
    targets: Any = knob("all-linear", "layers that are adapted: endings of their names, e.g. [q_proj,v_proj]; "
                        "all-linear: every linear layer but the head")


@dataclass(frozen=True)
class TrainConfig:
    num_ranks: int = knob(1, "data-parallel training ranks (DeepSpeed)", least=1)
    zero_stage: int = knob(0, "ZeRO stage: 0 to 3 (0 in bfloat16 runs as 1, which keeps fp32 weights)", least=0, most=3)
    learning_rate: float = knob(1e-6, "peak learning rate (AdamW)", least=0)
    adam_betas: list[float] = knob([0.9, 0.95], "AdamW's betas")
    adam_eps: float = knob(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = knob(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = knob(1.0, "gradient clipping by global norm; 0: none", least=0)
    warmup_steps: int = knob(10, "optimizer updates over which the learning rate rises linearly (a step has "
                             "algo.epochs x algo.mini_batches of them)", least=0)
    schedule: str = knob("constant", "the learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third more compute")
    num_threads: int = knob(1, "CPU threads of one rank", least=1)
    deadline_s: float = knob(1800.0, "longest time one training step may take, in seconds", above=0)
    deepspeed: dict[str, Any] = knob({}, "any further option of DeepSpeed's own config")
    lora: LoraConfig = group(LoraConfig)


@dataclass(frozen=True)
class WeightsConfig:
    backend: str = knob("auto", "nccl between GPUs, ipc where both ends share one, gloo on CPU; auto: by placement",
                        choices=("auto", "nccl", "ipc", "gloo"))
    staging: str = knob("auto", "none: engines stop while new weights come in, one bucket at a time; host (gloo), "
                        "device (nccl): the whole update comes into main memory, or the GPU, beside running requests, "
                        "is made ready there as far as the model allows, and they stop to put it in place; auto: host "
                        "where it comes through shared memory (gloo) and requests run meanwhile "
                        "(driver.max_staleness), else none",
                        choices=("auto", "none", "host", "device"))
    bucket_mib: int = knob(64, "size of one packed bucket, in MiB", least=1)
    deadline_s: float = knob(120.0, "longest time of each phase of an update (connect, send, then make ready and "
                             "finish), in seconds", above=0)


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = knob(None, "a running Ray (auto, or HOST:PORT); none: RAY_ADDRESS, else a Ray of its own")
    device: str = knob("auto", "auto: GPUs where the cluster has them", choices=("auto", "cpu", "cuda"))
    colocate: bool = knob(False, "engines, reference and trainer share GPUs (fractions); with one GPU always so")
    cpus_per_actor: float = knob(1.0, "CPUs that each actor asks Ray for (Ray of the run's own: declared as needed)",
                                 least=0)
    placement_deadline_s: float = knob(15.0, "longest wait for a placement group, in seconds", above=0)
    start_deadline_s: float = knob(600.0, "longest wait for an actor to be ready (a model to load), in seconds",
                                   above=0)
    env: dict[str, str] = knob({}, "environment variables of every actor")


@dataclass(frozen=True)
class DriverConfig:
    num_steps: int = knob(100, "training steps", least=1)
    max_staleness: int = knob(0, "versions that a token may be behind the trainer; 0: synchronous", least=0)
    streaming: str = knob("auto", "backward of finished groups while others of the step still generate: always, never; "
                          "auto: where generation and training have GPUs of their own, or max_staleness > 0 (not for "
                          "algorithms that need the whole batch)", choices=("auto", "always", "never"))


@dataclass(frozen=True)
class EvalConfig:
    data: Any = knob(None, "prompts, samples or pairs to evaluate on, as data.train has them; several sets by name "
                     "give eval/NAME/... too; none: no evaluation")
    share: float = knob(0.0, "share of data.train that is held out to evaluate on, where eval.data is none", least=0,
                        most=0.9)
    split: str = knob("test", "split to evaluate on, of a hub data set or a folder with splits")
    every: int = knob(0, "steps between evaluations; 0: only at start and end", least=0)
    stop_at: float | None = knob(None, "end the run, with its model saved, once an evaluation's eval/task_mean is at "
                                 "least this; none: run all steps")
    num_samples: int = knob(1, "samples per prompt", least=1)
    temperature: float | None = knob(None, "none: the rollout's", least=0)
    max_rows: int | None = knob(None, "use only the first rows", least=1)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = knob(0, "steps between checkpoints; 0: none but the model at the end", least=0)
    keep: int = knob(2, "checkpoints kept, the newest", least=1)


@dataclass(frozen=True)
class ObservabilityConfig:
    progress: bool = knob(True, "live progress on the terminal (warnings too), a line a step, at most one a second")
    tensorboard: bool = knob(False, "write TensorBoard events beside metrics.jsonl (needs the tensorboard package)")
    samples_per_step: int = knob(2, "samples written to samples.jsonl at each step", least=0)


@dataclass(frozen=True)
class Config:
    seed: int = knob(0, "one seed for everything", least=0)
    run_dir: str | None = knob(None, "folder of the run; none: runs/DATE_TIME under the folder it was started in")
    resume: str | None = knob(None, "a run folder, or one of its checkpoints, to go on from")
    plugins: list[str] = knob([], "Python files imported in every process: they register algorithms, rewards, rollouts")
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    rollout: RolloutConfig = group(RolloutConfig)
    reward: RewardConfig = group(RewardConfig)
    filter: FilterConfig = group(FilterConfig)
    reference: ReferenceConfig = group(ReferenceConfig)
    algo: AlgoConfig = group(AlgoConfig)
    critic: CriticConfig = group(CriticConfig)
    batch: BatchConfig = group(BatchConfig)
    train: TrainConfig = group(TrainConfig)
    weights: WeightsConfig = group(WeightsConfig)
    cluster: ClusterConfig = group(ClusterConfig)
    driver: DriverConfig = group(DriverConfig)
    eval: EvalConfig = group(EvalConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    observability: ObservabilityConfig = group(ObservabilityConfig)


def options(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option as (dotted key, field), in the order of the file."""
    for f in dataclasses.fields(cls):
        default = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            yield from options(default, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def schema() -> DictConfig:
    """Config's defaults and types as an OmegaConf tree to merge into (frozen dataclasses make read-only nodes)."""
    tree = OmegaConf.structured(Config)
    for name in ("", *sorted({section for key, _ in options() for section in names.sections_of(key)})):
        OmegaConf.set_readonly(OmegaConf.select(tree, name) if name else tree, False)
    for key in open_options():
        OmegaConf.set_struct(OmegaConf.select(tree, key), False)
    return tree


def open_options() -> list[str]:
    """The options that are mappings: any key may be set below them."""
    return [key for key, f in options() if isinstance(default_of(f), dict)]


def default_of(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def from_dict(values: Mapping[str, Any]) -> Config:
    """Config from plain values: nested, dotted or by the names people bring; what is absent keeps its default.

    >>> from_dict({"algorithm": "grpo", "algo": {"epsilon": 0.3}, "rollout.group_size": 8}).algo.clip_range
    0.3

    Raises UserError: unknown keys (with the nearest right one), wrong types, two names of one option that disagree.
    """
    keys = [key for key, _ in options()]
    tree = schema()
    flat = names.flatten(values, options=keys)
    try:
        for key, value in flat.items():
            OmegaConf.update(tree, key, value, merge=False, force_add=key not in keys)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise names.explain(error, options=keys) or error from error
    assert isinstance(config, Config)
    return config


def from_tree(tree: DictConfig) -> Config:
    """Config from what Hydra composed."""
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise names.explain(error, options=[key for key, _ in options()]) or error from error
    assert isinstance(values, dict)
    return from_dict(values)   # type: ignore[arg-type]  # the keys of our own schema are text


def preset(algorithm: str) -> dict[str, Any]:
    """What conf/algo/NAME.yaml sets, for the Python API, which composes nothing; empty for a user's own algorithm."""
    name = names.ALGORITHM_ALIASES.get(algorithm, algorithm)
    file = CONF / "algo" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    return values or {}   # type: ignore[return-value]  # the same


def validate(config: Config) -> Config:
    """The config itself, once every check that values alone allow has passed. UserError names key and value."""
    check_values(config)
    for problem in _problems(config):
        raise UserError(problem)
    return config


def check_values(config: Config) -> None:
    """UserError for an option whose value can't be, whatever the others are."""
    for key, f in options():
        _check_value(key, _get(config, key), f)
    for problem in _data_problems(config):
        raise UserError(problem)


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _check_value(key: str, value: Any, f: dataclasses.Field) -> None:
    if value is None:
        return
    choices, bounds = f.metadata["choices"], f.metadata["bounds"]
    if value == "None" and default_of(f) is None:
        raise UserError(f"{key}=None is the word None: nothing is written null")
    if choices and value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}; got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be a finite number, got {value}")
    if "least" in bounds and value < bounds["least"]:
        raise UserError(f"{key} must be >= {bounds['least']}, got {value}")
    if "above" in bounds and value <= bounds["above"]:
        raise UserError(f"{key} must be > {bounds['above']}, got {value}")
    if "most" in bounds and value > bounds["most"]:
        raise UserError(f"{key} must be <= {bounds['most']}, got {value}")


def _problems(config: Config) -> Iterator[str]:
    """What is wrong between values, the most basic first."""
    if not config.model.path:
        yield "model.path is missing: the policy to train, a local folder or a hub name (model.path=...)"
    if not config.data.train:
        yield "data.train is missing: the prompts to train on, a file or a hub data set (data.train=...)"
    prompts, updates, ranks = config.batch.prompts_per_step, config.algo.mini_batches, config.train.num_ranks
    if prompts % updates:
        yield (f"batch.prompts_per_step={prompts} must be divisible by algo.mini_batches={updates}: "
               "every update of a step takes equally many")
    if prompts // updates % ranks:
        yield (f"batch.prompts_per_step={prompts} / algo.mini_batches={updates} = {prompts // updates} must be "
               f"divisible by train.num_ranks={ranks}: every rank takes equally many, and a group is never split over "
               "ranks")
    functions, weights = config.reward.functions, config.reward.weights
    if weights and len(weights) != len(functions):
        yield f"reward.weights={weights} must be as many as reward.functions={functions}"
    betas = config.train.adam_betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"train.adam_betas must be two numbers in [0, 1), got {betas}"
    yield from _lora_problems(config)
    if config.algo.icepop_low >= config.algo.icepop_high:
        yield f"algo.icepop_low={config.algo.icepop_low} must be < algo.icepop_high={config.algo.icepop_high}"
    context, response = config.rollout.max_model_len, config.rollout.max_tokens
    if context is not None and context <= response:
        yield f"rollout.max_model_len={context} must be > rollout.max_tokens={response}: the prompt needs room too"
    if config.eval.every and not config.eval.data and not config.eval.share:
        yield f"eval.every={config.eval.every} needs eval.data: the prompts to evaluate on (or eval.share)"
    if config.eval.data and config.eval.share:
        yield f"eval.share={config.eval.share:g} beside eval.data={config.eval.data}: give one of them"
    if config.eval.stop_at is not None and not config.eval.every:
        yield f"eval.stop_at={config.eval.stop_at} needs eval.every: the steps between the evaluations that it looks at"
    if config.eval.temperature == 0 and config.eval.num_samples > 1:
        yield f"eval.num_samples={config.eval.num_samples} needs eval.temperature > 0: at 0 all samples are the same"


def _data_problems(config: Config) -> Iterator[str]:
    template = config.data.prompt_template
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        yield f"data.prompt_template {template!r}: {error} (write a brace that is meant twice)"
        return
    if template is not None and not fields:
        yield (f"data.prompt_template={template!r} has no {{prompt}}: every prompt would be this text (what goes "
               "before a chat is data.system_prompt)")
    if "" in fields:
        yield f"data.prompt_template={template!r}: name what goes into {{}}: {{prompt}}, or a column"


def _lora_problems(config: Config) -> Iterator[str]:
    lora, reference = config.train.lora, config.reference
    if not lora.rank:
        given = [f"train.lora.{f.name}={getattr(lora, f.name)}" for f in dataclasses.fields(LoraConfig)
                 if getattr(lora, f.name) != default_of(f)]
        if given:
            yield f"{given[0]} is read with train.lora.rank > 0 alone, which is 0"
        return
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        yield f"train.lora.targets must be all-linear or endings of layers' names, e.g. [q_proj,v_proj]; got {targets}"
    if reference.path is None:
        given = [f"reference.{name}={getattr(reference, name)}" for name in ("num_actors", "dtype")
                 if getattr(reference, name) != getattr(ReferenceConfig(), name)]
        if given:
            yield (f"{given[0]} beside train.lora.rank={lora.rank}: the reference is the policy without its adapter, "
                   "in the training ranks; give reference.path for reference actors")
