"""The sections of a config: a dataclass for each, with the options of that part of a run.

Knows:  a section of which objectives read different parts is a base class with what all of them read, and a class for
        each that reads more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flux_ray.config.knobs import group, knob, retuned

DEFAULT_REWARD = "numeric_or_exact"  # where reward.functions names none and the data have an answer
OVERLONG_SHARE = 0.2  # of rollout.max_tokens: where the soft penalty begins, unless reward.overlong_tokens says it


@dataclass(frozen=True)
class DataConfig:
    train: Any = knob(None, "prompts to train on: a file, folder or glob, a hub data set (NAME or NAME:SUBSET), a list "
                      "of these, or several sets {NAME: {path: ..., weight: ..., an option of data: ...}}")
    split: str = knob("train", "split to train on, of a hub data set or a folder with splits")
    prompt_column: str = knob("prompt", "column that holds the prompt: a text, or a list of chat messages")
    system_prompt: str | None = knob(None, "system message put before every chat prompt that has none of its own")
    chat_template_kwargs: dict[str, Any] = knob({}, "what the chat template gets beside the messages, e.g. "
                                                "chat_template_kwargs.enable_thinking=false")
    as_chat: bool = knob(False, "wrap a plain text prompt as a user message and apply the chat template")
    prompt_template: str | None = knob(None, "text around a plain prompt, which goes where {prompt} is; {COLUMN} is "
                                      "that column's cell")
    on_bad_row: str = knob("stop", "what a bad row does: stop the run at start, or be skipped and counted",
                           choices=("stop", "skip"))
    shuffle: bool = knob(True, "draw the rows of each epoch in a new order (from the seed)")
    max_rows: int | None = knob(None, "use only the first rows of a set", least=1)


@dataclass(frozen=True)
class PromptDataConfig(DataConfig):
    """Prompts whose responses are sampled and scored."""

    answer_column: str = knob("answer", "column that the built-in rewards compare a completion with; where the data "
                             "have no such column: solution or label")
    max_prompt_tokens: int | None = knob(None, "longest prompt in tokens; none: what the context leaves", least=1)
    prefill: bool = knob(False, "a prompt whose last message is the assistant's is gone on with; else that message is "
                         "left out")
    curriculum: str = knob("none", "order of the rows within an epoch, by data.pass_rate_column: easy_first, or "
                           "unsure_first (those soonest whose rewards vary most)",
                           choices=("none", "easy_first", "unsure_first"))
    pass_rate_column: str = knob("pass_rate", "column that holds how often the policy was right, 0 to 1 "
                                 "(data.curriculum)")


@dataclass(frozen=True)
class ExampleDataConfig(DataConfig):
    """Completions to learn."""

    completion_column: str = knob("completion", "column that holds the completion to learn (algo=sft)")
    learn_turns: str = knob("last", "turns of a chat that are learned: the assistant's last one, or all of its "
                            "(algo=sft)", choices=("last", "all"))


@dataclass(frozen=True)
class PairDataConfig(DataConfig):
    """Preference pairs."""

    margin_column: str = knob("margin", "column of pairs that holds how much better chosen is (algo=reward_model); "
                              "may be absent: 0")


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


@dataclass(frozen=True)
class PolicyModelConfig(ModelConfig):
    """A model that gives log-probs."""

    logprob_chunk_tokens: int = knob(1024, "tokens whose logits are held at once: no batch x vocabulary tensor",
                                     least=1)


@dataclass(frozen=True)
class ContextConfig:
    """The section `rollout` where nothing is rolled out: how long a text may be."""

    max_model_len: int | None = knob(None, "context in tokens; none: the model's own", least=1)


@dataclass(frozen=True)
class SampledConfig(ContextConfig):
    """How the groups that are trained on were sampled, here or elsewhere."""

    group_size: int = knob(4, "G: responses per prompt", least=1)
    max_tokens: int = knob(256, "longest response in tokens (over all turns of a rollout)", least=1)
    temperature: float = knob(1.0, "sampling temperature; log-probs everywhere are those of the distribution sampled",
                              above=0)


@dataclass(frozen=True)
class RolloutConfig(SampledConfig):
    num_engines: int = knob(1, "vLLM engines, one placement group each", least=1)
    num_workers: int | None = knob(None, "rollout workers: processes that carry groups from prompt to scored; none: "
                                   "one for every 8 engines", least=1)
    tensor_parallel_size: int = knob(1, "GPUs of one engine", least=1)
    ignore_eos: bool = knob(False, "go on past the end token up to max_tokens (benchmarks)")
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
    kv_cache_gib: float = knob(1.0, "KV cache of an engine on CPU, in GiB (GPU: "
                               "rollout.engine_args.gpu_memory_utilization)", above=0)
    max_num_seqs: int = knob(256, "sequences that an engine runs at once", least=1)
    split_groups: int = knob(1, "requests that a group is split into, each on the engine that has least to do; a "
                             "sample has the same seed on any of them (rollout.function sees the part)", least=1)
    deadline_s: float = knob(600.0, "longest wait for one group, in seconds", above=0)
    return_experts: bool = knob(False, "mixtures of experts: engines return which experts they chose for each token, "
                                "and rollout/router_agreement is measured")
    engine_args: dict[str, Any] = knob({}, "any further option of vLLM's AsyncEngineArgs")


@dataclass(frozen=True)
class RewardConfig:
    functions: list[str] = knob([], "rewards: rules (exact_match, numeric, numeric_or_exact, math, regex or format, "
                                "length, repetition), registered names, path/to/file.py:function, "
                                "package.module:function or model:PATH (a reward model); none with an answer column: "
                                f"{DEFAULT_REWARD}")
    weights: list[float] = knob([], "one weight per function; none: 1 each")
    combine: str = knob("sum", "several functions: sum (weighted, then the algorithm's advantage), or each (each one "
                        "normalised alone over its group, then weighted; algo.normalize_by_std divides no more)",
                        choices=("sum", "each"))
    overlong_penalty: float = knob(0.0, "soft penalty on length, reached at rollout.max_tokens (task rewards don't "
                                   "have it); 0: none", least=0)
    overlong_tokens: int | None = knob(None, "last tokens of rollout.max_tokens over which it rises from 0; none: "
                                       f"{OVERLONG_SHARE:g} of them", least=1)
    options: dict[str, Any] = knob({}, "arguments of a function by its name, e.g. options.regex.pattern='#### ...'")
    opening: str | None = knob(None, "what the chat template begins the answer with, e.g. <think>: rewards see it "
                               "before each completion, with the blanks after it")
    env: list[str] = knob([], "environment variables that your own functions see, by name, e.g. [JUDGE_API_KEY]; their "
                          "values are those where the run is started, and are written nowhere")
    num_workers: int = knob(1, "processes that score", least=1)
    model_replicas: int = knob(1, "actors of each reward model", least=1)
    model_tokens_per_forward: int = knob(8192, "tokens of one forward pass of a reward model", least=1)
    deadline_s: float = knob(60.0, "longest time one call of one function may take, in seconds", above=0)
    retries: int = knob(1, "times that a sample whose call failed is tried again, alone", least=0)
    on_failure: str = knob("stop", "a sample that failed, its retries included: stop the run, or drop that sample (and "
                           "its group where fewer than two have a reward), and count it", choices=("stop", "drop"))
    max_error_share: float = knob(0.5, "share of the last 100 samples that may have failed, with on_failure=drop; "
                                  "above it the run stops", least=0, most=1)
    memory_gib: float | None = knob(16.0, "memory that a process of your own functions may take beyond what it starts "
                                    "with; none: no limit", above=0)
    cpu_s: float | None = knob(None, "CPU time of one call of a plain function of your own, in seconds; none: "
                               "deadline_s alone bounds it", above=0)
    file_gib: float | None = knob(16.0, "size of a file that your own functions write; none: no limit", above=0)
    open_files: int | None = knob(1024, "files that a process of your own functions may have open; none: no limit",
                                  least=64)
    processes: int | None = knob(256, "processes that your own functions may have started at once; none: no limit",
                                 least=1)
    output_kib: int | None = knob(1024, "what one call of your own functions may print into the log, in KiB; the rest "
                                  "is left out; none: no limit", least=0)

    @property
    def scored_by(self) -> list[str]:
        """The functions, or the one that stands in where none is named."""
        return list(self.functions) or [DEFAULT_REWARD]

    def overlong_span(self, max_tokens: int) -> float:
        """Last tokens of `max_tokens` over which the soft penalty rises."""
        return self.overlong_tokens or max_tokens * OVERLONG_SHARE


@dataclass(frozen=True)
class KeptConfig:
    """Which groups are kept."""

    reward: str | None = knob(None, "drop a group whose samples all have this reward alike and draw another prompt: "
                              "task (all rewards but shaping), or a function's name; none: keep every group")


@dataclass(frozen=True)
class FilterConfig(KeptConfig):
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
class CriticConfig:
    """Of algorithms whose advantages need values; it trains as train says, and on as many ranks."""

    path: str | None = knob(None, "where it starts: a policy or a reward model; none: the policy's own start")
    learning_rate: float = knob(1e-5, "peak learning rate (AdamW), on train's schedule", least=0, most=10)
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
    learning_rate: float = knob(1e-6, "peak learning rate (AdamW)", least=0, most=10)
    adam_betas: list[float] = knob([0.9, 0.95], "AdamW's betas")
    adam_eps: float = knob(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = knob(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = knob(1.0, "gradient clipping by global norm; 0: none", least=0)
    warmup_steps: int = knob(10, "optimizer updates over which the learning rate rises linearly (a step has "
                             "algo.epochs x algo.mini_batches of them)", least=0)
    schedule: str = knob("constant", "the learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third more compute")
    router_balance_coef: float = knob(0.0, "mixtures of experts: weight of the loss that keeps routers even, in each "
                                      "micro-batch (policies, sft); 0: none", least=0)
    freeze_routers: bool = knob(False, "mixtures of experts: routers stay as they were loaded")
    num_threads: int = knob(1, "CPU threads of one rank", least=1)
    deadline_s: float = knob(1800.0, "longest time one training step may take, in seconds", above=0)
    deepspeed: dict[str, Any] = knob({}, "any further option of DeepSpeed's own config")
    lora: LoraConfig = group(LoraConfig)


@dataclass(frozen=True)
class SFTTrainConfig(TrainConfig):
    learning_rate: float = retuned(TrainConfig, "learning_rate", 2e-5)


@dataclass(frozen=True)
class RewardModelTrainConfig(TrainConfig):
    learning_rate: float = retuned(TrainConfig, "learning_rate", 1e-5)


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
    allow_logprob_gap: bool = knob(False, "train although engines and trainer give the same tokens other log-probs at "
                                   "the start (a quantised engine, say); it is warned of all the same")
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
    max_restarts: int = knob(3, "times in a row that a run goes on from its last checkpoint after something died that "
                             "nobody can replace, without getting further than before; 0: the first death of an actor "
                             "of ours ends the run", least=0)
    server_deadline_s: float = knob(10.0, "longest silence of the server (GCS) of a cluster that is joined; then the "
                                    "run ends. More where that server is fault-tolerant; after 60 s Ray itself ends "
                                    "the run", above=0)
    allow_open: bool = knob(False, "join a cluster that other machines reach and that asks for no token")
    env: dict[str, str] = knob({}, "environment variables of every actor")


@dataclass(frozen=True)
class StepsConfig:
    """The section `driver` of a loop without rollouts."""

    num_steps: int = knob(100, "training steps", least=1)


@dataclass(frozen=True)
class DriverConfig(StepsConfig):
    max_staleness: int = knob(0, "versions that a token may be behind the trainer; 0: synchronous", least=0)
    streaming: str = knob("auto", "backward of finished groups while others of the step still generate: always, never; "
                          "auto: where generation and training have GPUs of their own, or max_staleness > 0 (not for "
                          "algorithms that need the whole batch)", choices=("auto", "always", "never"))
    deterministic: bool = knob(False, "with max_staleness > 0: a batch is the first groups in the order of prompts, "
                               "and new weights wait for all groups that were started before: on CPU the same "
                               "seed gives the same run to the last bit; slower")


@dataclass(frozen=True)
class EvalConfig:
    data: Any = knob(None, "prompts, samples or pairs to evaluate on, as data.train has them; several sets by name "
                     "give eval/NAME/... too; none: no evaluation")
    share: float = knob(0.0, "share of data.train that is held out to evaluate on, where eval.data is none", least=0,
                        most=0.9)
    split: str = knob("test", "split to evaluate on, of a hub data set or a folder with splits")
    every: int = knob(0, "steps between evaluations; 0: only at start and end", least=0)
    max_rows: int | None = knob(None, "use only the first rows", least=1)
    patience: int = knob(0, "end the run, with its model saved, after so many evaluations in a row that were no better "
                         "than the best by checkpoint.best; 0: never", least=0)


@dataclass(frozen=True)
class RolloutEvalConfig(EvalConfig):
    """Responses to the prompts are sampled and scored."""

    stop_at: float | None = knob(None, "end the run, with its model saved, once an evaluation's eval/task_mean is at "
                                 "least this; none: run all steps")
    num_samples: int = knob(1, "samples per prompt; above 1 there are eval/pass@K and eval/maj@K", least=1)
    temperature: float | None = knob(None, "none: the rollout's; 0: greedy", least=0)
    pass_reward: float = knob(1.0, "a sample is right (pass@k, maj@k) where its task reward is at least this")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = knob(0, "steps between checkpoints; 0: every_s alone makes them", least=0)
    every_s: float = knob(600.0, "a step that ends so many seconds after the last checkpoint makes one too; 0: none",
                          least=0)
    keep: int = knob(2, "checkpoints kept, the newest", least=1)
    best: str | None = knob(None, "a metric of evaluations, as eval/task_mean: the checkpoint where it is highest is "
                                  "kept as well; -eval/loss: where it is lowest")
    background: str = knob("auto", "write beside the next step, from a copy in memory; auto: where it takes no more "
                                   "than half of what is free", choices=("auto", "always", "never"))
    on_stop: bool = knob(True, "save a checkpoint when the run is asked to end (Ctrl-C, SIGTERM, SIGHUP)")


@dataclass(frozen=True)
class ObservabilityConfig:
    progress: bool = knob(True, "live progress on the terminal (warnings too), a line a step, at most one a second")
    monitors: list[str] = knob([], "what else gets metrics, evaluations and warnings: tensorboard, wandb, mlflow, "
                               "trackio (pip install 'flux-ray[NAME]'), prometheus, or a name that a plugin registers")
    trace_steps: list[int] = knob([], "steps (from 0, as in metrics.jsonl) whose time line is written to "
                                  "RUN/traces/step-NNNNNN.json, for chrome://tracing and ui.perfetto.dev")


@dataclass(frozen=True)
class RolloutObservabilityConfig(ObservabilityConfig):
    samples_per_step: int = knob(2, "samples written to samples.jsonl at each step", least=0)
    rollouts_max_gib: float = knob(10.0, "most that the rollouts of a run may take on disk, in GiB: beyond it older "
                                   "steps are thinned; 0: none are written", least=0)
    rollouts_share: float = knob(1.0, "share of the groups whose rollouts are written", above=0, most=1)
