"""What OpenRLHF's command line calls an option: the dotted names of 2026, and the plain ones that came before.

Gives:  TABLE: their name (without the two dashes) ► ours, or one sentence that says what there is instead.
"""

from __future__ import annotations

from flux_ray.names.counterpart import Counterpart, none, values

_GPUS = none("actors are placed by their number: rollout.num_engines, train.num_ranks, reference.num_actors")
_COLOCATE = none("cluster.colocate=true lets engines, reference and trainer share GPUs")
_SLEEP = none("an engine keeps its memory; cluster.colocate=true shares a GPU by fractions")
_HIDDEN = none("weights always travel by buckets, over NCCL, IPC or gloo: weights.backend")
_ZERO = none("train.deepspeed takes any further option of DeepSpeed's own config")
_CKPT = none("a checkpoint always holds model, optimizer and position: checkpoint.every, checkpoint.keep")
_EMA = none("no moving average of the weights is kept")
_PACKED = none("batch.max_tokens_per_micro_batch bounds a micro-batch; model.layout says how samples lie in it")
_WANDB = none("observability.monitors=[wandb] writes to W&B, by its own variables (WANDB_PROJECT, WANDB_ENTITY, …)")
_RING = none("a sequence stays on one rank: there is no sequence parallelism")
_BATCH = none("batch.prompts_per_step prompts make a step, algo.mini_batches updates; train.num_ranks share each")
_MUON = none("the optimizer is AdamW (train.adam_betas, train.adam_eps, train.weight_decay)")
_EPOCHS = none("the length is in steps: driver.num_steps (an epoch is rows / batch.prompts_per_step)")
_WARMUP = none("the warm-up is in optimizer updates: train.warmup_steps")
_QUANTIZED = none("weights aren't quantized: train.lora.rank=16 trains an adapter alone")
_BALANCE = none("train.router_balance_coef weighs a loss that is 1 where experts get equally much")
_FAST = none("the tokenizer is opened as its folder says")
_LENGTH = none("rollout.max_model_len is the longest text, prompt and response together")
_BF16 = none("model.dtype=bfloat16 or float32 sets the type of weights and activations")
_VALUE_HEAD = none("a critic has transformers' own score head: critic.path may be a reward model")
_TEMPLATE = none("data.prompt_template puts a text around the prompt: {prompt} is where it goes")
_REWARD_TRICK = none("no such shaping here; write it as a reward function of your own")
_MS = none("models come from a folder or the Hugging Face hub")
_ESTIMATORS = {"gae": "ppo", "reinforce": "reinforce_pp", "rloo": "rloo", "reinforce_baseline": "reinforce_pp_baseline",
               "group_norm": "grpo", "dr_grpo": "dr_grpo"}
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
              "cosine_with_min_lr": "cosine"}
_NO_MEANING_TWICE = none("the two bounds are algo.clip_range (low) and algo.clip_range_high")

#: The plain names (until 2025).
PLAIN: dict[str, Counterpart] = {
    "pretrain": "model.path", "reward_pretrain": none("a reward model is one of reward.functions, as model:PATH"),
    "critic_pretrain": "critic.path", "ref_pretrain": "reference.path",
    "remote_rm_url": none("a reward that asks a server is a function of yours: reward.functions=[my.py:ask]"),
    "agent_func_path": none("an agent is a rollout function: rollout.function=my.py:rollout"),
    "prompt_data": "data.train", "dataset": "data.train", "prompt_split": "data.split", "dataset_split": "data.split",
    "prompt_data_probs": none("each set of data.train has its weight"),
    "dataset_probs": none("each set of data.train has its weight"),
    "eval_dataset": "eval.data", "eval_split": "eval.split", "eval_temperature": "eval.temperature",
    "eval_n_samples_per_prompt": "eval.num_samples", "eval_steps": "eval.every",
    "input_key": "data.prompt_column", "label_key": "data.answer_column", "output_key": "data.completion_column",
    "prompt_key": "data.prompt_column",
    "chosen_key": none("pairs have the columns chosen and rejected"),
    "rejected_key": none("pairs have the columns chosen and rejected"),
    "image_key": none("prompts are texts"), "input_template": _TEMPLATE,
    "apply_chat_template": "data.as_chat",
    "tokenizer_chat_template": none("the chat template is the tokenizer's: save it there"),
    "max_samples": "data.max_rows", "multiturn": values("data.learn_turns", {"True": "all", "False": "last"}),
    "rollout_batch_size": "batch.prompts_per_step", "train_batch_size": _BATCH, "micro_train_batch_size": _BATCH,
    "micro_rollout_batch_size": _BATCH, "vllm_generate_batch_size": _BATCH,
    "n_samples_per_prompt": "rollout.group_size", "max_epochs": "algo.epochs", "num_episodes": _EPOCHS,
    "prompt_max_len": "data.max_prompt_tokens", "generate_max_len": "rollout.max_tokens", "max_len": _LENGTH,
    "max_new_tokens": "rollout.max_tokens", "temperature": "rollout.temperature", "top_p": "rollout.top_p",
    "actor_learning_rate": "train.learning_rate", "critic_learning_rate": "critic.learning_rate",
    "learning_rate": "train.learning_rate", "l2": "train.weight_decay", "adam_betas": "train.adam_betas",
    "max_norm": "train.max_grad_norm", "lr_warmup_ratio": _WARMUP, "lr_scheduler": values("train.schedule", _SCHEDULES),
    "advantage_estimator": values("algo.name", _ESTIMATORS), "no_advantage_std_norm": values(
        "algo.normalize_by_std", {"True": False, "False": True}),
    "init_kl_coef": none("algo.beta is the KL's weight in the loss (use_kl_loss), algo.kl_coef in the reward"),
    "use_kl_loss": none("algo.beta is the KL's weight in the loss, algo.kl_coef in the reward"),
    "kl_estimator": "algo.kl_estimator", "kl_target": "algo.kl_target", "kl_horizon": "algo.kl_horizon",
    "beta": "algo.beta", "ipo": none("algo=ipo"), "label_smoothing": "algo.label_smoothing",
    "nll_loss_coef": none("pairs have no further term in the loss"), "ptx_coef": none("no pre-training loss is added"),
    "eps_clip": "algo.clip_range", "eps_clip_low_high": _NO_MEANING_TWICE, "dual_clip": "algo.dual_clip",
    "value_clip": "critic.clip_range", "lambd": "algo.gae_lambda", "gamma": "algo.gamma",
    "entropy_loss_coef": "algo.entropy_coef", "aux_loss_coef": _BALANCE,
    "policy_loss_type": none("the algorithm has its loss (algo=gspo, ...); algo.policy_loss chooses another"),
    "enable_vllm_is_correction": values("algo.off_policy", {"True": "tis", "False": "none"}),
    "vllm_is_truncated_threshold": none("algo.tis_cap for algo.off_policy=tis; algo.icepop_low and algo.icepop_high"),
    "normalize_reward": _REWARD_TRICK, "reward_clip_range": _REWARD_TRICK,
    "overlong_buffer_len": "reward.overlong_tokens", "overlong_penalty_factor": "reward.overlong_penalty",
    "dynamic_filtering": values("filter.reward", {"True": "task", "False": None}),
    "dynamic_filtering_reward_range": none("filter.reward=task drops groups whose rewards are all alike"),
    "freezing_actor_steps": "critic.warmup_steps", "save_value_network": none("the critic is saved in checkpoints"),
    "vllm_num_engines": "rollout.num_engines", "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "vllm_gpu_memory_utilization": "rollout.engine_args.gpu_memory_utilization",
    "enforce_eager": "rollout.engine_args.enforce_eager",
    "enable_prefix_caching": "rollout.engine_args.enable_prefix_caching",
    "vllm_sync_backend": values("weights.backend", {"nccl": "nccl", "gloo": "gloo"}), "vllm_sync_with_ray": _HIDDEN,
    "vllm_enable_sleep": _SLEEP, "deepspeed_enable_sleep": _SLEEP, "colocate_all_models": "cluster.colocate",
    "colocate_actor_ref": _COLOCATE, "colocate_critic_reward": _COLOCATE,
    "actor_num_nodes": _GPUS, "actor_num_gpus_per_node": "train.num_ranks", "critic_num_nodes": _GPUS,
    "critic_num_gpus_per_node": none("a critic has as many ranks as the policy: train.num_ranks"),
    "ref_num_nodes": _GPUS, "ref_num_gpus_per_node": "reference.num_actors", "reward_num_nodes": _GPUS,
    "reward_num_gpus_per_node": "reward.model_replicas",
    "async_train": none("driver.max_staleness=1 or more trains while the next step is sampled"),
    "async_queue_size": "driver.max_staleness", "partial_rollout_enable": none(
        "with driver.max_staleness above 0 running requests go on across an update"),
    "save_path": "run_dir", "ckpt_path": none("checkpoints lie in the run's folder: run_dir"),
    "save_steps": "checkpoint.every", "max_ckpt_num": "checkpoint.keep", "max_ckpt_mem": _CKPT, "save_hf_ckpt": _CKPT,
    "disable_ds_ckpt": _CKPT, "use_ds_universal_ckpt": _CKPT, "load_checkpoint": none("resume=RUN goes on"),
    "logging_steps": none("every step is logged"),
    "zero_stage": "train.zero_stage", "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_use_reentrant": none("train.gradient_checkpointing is on or off"),
    "bf16": _BF16, "deepcompile": _ZERO, "zpg": _ZERO, "adam_offload": _ZERO, "grad_accum_dtype": _ZERO,
    "overlap_comm": _ZERO, "ds_tensor_parallel_size": none("training is sharded by ZeRO alone: train.zero_stage"),
    "actor_init_on_gpu": _ZERO, "ref_reward_offload": _ZERO, "enable_ema": _EMA, "ema_beta": _EMA,
    "attn_implementation": "model.attention", "flash_attn": none("model.attention and model.layout=varlen"),
    "use_liger_kernel": none("log-probs never hold a batch x vocabulary tensor: model.logprob_chunk_tokens"),
    "disable_fast_tokenizer": _FAST, "packing_samples": _PACKED, "use_dynamic_batch": _PACKED,
    "rollout_max_tokens_per_gpu": "batch.max_tokens_per_micro_batch",
    "train_max_tokens_per_gpu": "batch.max_tokens_per_micro_batch",
    "load_in_4bit": _QUANTIZED, "lora_rank": "train.lora.rank", "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout", "target_modules": "train.lora.targets",
    "ring_attn_size": _RING, "ring_head_stride": _RING, "value_head_prefix": _VALUE_HEAD,
    "seed": "seed", "full_determinism": none("runs of one seed are bit-equal on CPU"),
    "local_rank": none("Ray starts the ranks: train.num_ranks"),
    "use_wandb": _WANDB, "wandb_org": _WANDB, "wandb_group": _WANDB, "wandb_project": _WANDB, "wandb_run_name": _WANDB,
    "use_tensorboard": none("observability.monitors=[tensorboard] writes it"), "perf": none("every step has its times"),
    "use_ms": _MS, "loss_type": none("a reward model learns by Bradley-Terry"),
    "margin_loss": none("a column of margins is read where there is one: data.margin_column"),
    "compute_fp32_loss": none("losses are computed in fp32"), "pretrain_mode": none("sft learns completions alone"),
    "optim": _MUON, "min_lr_ratio": none("a schedule ends at 0"),
}

#: The dotted names (2026) ► the plain one that means the same.
_DOTTED = {
    "ref.num_nodes": "ref_num_nodes", "ref.num_gpus_per_node": "ref_num_gpus_per_node",
    "reward.num_nodes": "reward_num_nodes", "reward.num_gpus_per_node": "reward_num_gpus_per_node",
    "actor.num_nodes": "actor_num_nodes", "actor.num_gpus_per_node": "actor_num_gpus_per_node",
    "critic.num_nodes": "critic_num_nodes", "critic.num_gpus_per_node": "critic_num_gpus_per_node",
    "train.colocate_actor_ref": "colocate_actor_ref", "train.colocate_critic_reward": "colocate_critic_reward",
    "train.colocate_all": "colocate_all_models", "train.colocate_all_models": "colocate_all_models",
    "vllm.num_engines": "vllm_num_engines", "vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
    "vllm.sync_backend": "vllm_sync_backend", "vllm.sync_with_ray": "vllm_sync_with_ray",
    "vllm.enable_prefix_caching": "enable_prefix_caching", "vllm.enforce_eager": "enforce_eager",
    "vllm.enable_sleep": "vllm_enable_sleep", "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "ds.enable_sleep": "deepspeed_enable_sleep", "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.advantage.is_correction_type": "enable_vllm_is_correction",
    "algo.advantage.is_correction_threshold": "vllm_is_truncated_threshold",
    "algo.advantage.is_correction_gate": "vllm_is_truncated_threshold",
    "train.async_enable": "async_train", "train.async_queue_size": "async_queue_size",
    "train.partial_rollout_enable": "partial_rollout_enable", "eval.steps": "eval_steps",
    "ckpt.save_steps": "save_steps", "logger.logging_steps": "logging_steps", "ckpt.path": "ckpt_path",
    "ckpt.save_hf": "save_hf_ckpt", "ckpt.disable_ds": "disable_ds_ckpt", "ckpt.max_num": "max_ckpt_num",
    "ckpt.max_mem": "max_ckpt_mem", "ckpt.load_enable": "load_checkpoint", "ckpt.output_dir": "save_path",
    "ds.use_universal_ckpt": "use_ds_universal_ckpt", "ds.zero_stage": "zero_stage",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "model.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "model.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "ds.deepcompile": "deepcompile", "train.enable_ema": "enable_ema", "train.ema_beta": "ema_beta", "ds.zpg": "zpg",
    "ds.adam_offload": "adam_offload", "ds.use_liger_kernel": "use_liger_kernel", "ds.param_dtype": "bf16",
    "ds.grad_accum_dtype": "grad_accum_dtype", "ds.overlap_comm": "overlap_comm",
    "ds.attn_implementation": "attn_implementation", "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size", "ds.packing_samples": "packing_samples",
    "train.dynamic_batch_enable": "use_dynamic_batch", "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "train.max_tokens_per_gpu": "train_max_tokens_per_gpu", "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.rank": "lora_rank", "ds.lora.alpha": "lora_alpha", "ds.lora.dropout": "lora_dropout",
    "ds.lora.target_modules": "target_modules", "train.num_episodes": "num_episodes",
    "rollout.batch_size": "rollout_batch_size", "rollout.vllm_generate_batch_size": "vllm_generate_batch_size",
    "rollout.micro_batch_size": "micro_rollout_batch_size", "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "rollout.max_new_tokens": "max_new_tokens", "rollout.top_p": "top_p", "rollout.temperature": "temperature",
    "train.max_epochs": "max_epochs", "data.max_len": "max_len", "data.max_samples": "max_samples",
    "actor.eps_clip": "eps_clip", "actor.eps_clip_low_high": "eps_clip_low_high", "actor.dual_clip": "dual_clip",
    "critic.value_clip": "value_clip", "algo.advantage.lambd": "lambd", "algo.advantage.gamma": "gamma",
    "algo.advantage.estimator": "advantage_estimator", "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "train.micro_batch_size": "micro_train_batch_size", "train.batch_size": "train_batch_size",
    "reward.normalize_enable": "normalize_reward", "train.seed": "seed",
    "train.full_determinism_enable": "full_determinism", "critic.freezing_steps": "freezing_actor_steps",
    "critic.save_value_network": "save_value_network", "algo.kl.target": "kl_target", "algo.kl.horizon": "kl_horizon",
    "algo.kl.init_coef": "init_kl_coef", "algo.kl.estimator": "kl_estimator", "algo.kl.use_loss": "use_kl_loss",
    "actor.policy_loss_type": "policy_loss_type", "actor.aux_loss_coef": "aux_loss_coef",
    "model.aux_loss_coef": "aux_loss_coef", "actor.entropy_coef": "entropy_loss_coef",
    "reward.clip_range": "reward_clip_range", "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor", "reward.stop_properly_penalty_coef":
    "normalize_reward", "ds.ring_attn_size": "ring_attn_size", "ds.ring_attn_head_stride": "ring_head_stride",
    "actor.model_name_or_path": "pretrain", "model.model_name_or_path": "pretrain",
    "reward.model_name_or_path": "reward_pretrain", "critic.model_name_or_path": "critic_pretrain",
    "ref.model_name_or_path": "ref_pretrain", "reward.remote_url": "remote_rm_url",
    "ds.value_head_prefix": "value_head_prefix", "ref.offload": "ref_reward_offload",
    "reward.offload": "ref_reward_offload", "train.agent_func_path": "agent_func_path",
    "data.prompt_dataset": "prompt_data", "data.prompt_split": "prompt_split", "data.prompt_probs": "prompt_data_probs",
    "data.dataset": "dataset", "data.dataset_split": "dataset_split", "data.dataset_probs": "dataset_probs",
    "eval.dataset": "eval_dataset", "eval.split": "eval_split", "eval.temperature": "eval_temperature",
    "eval.n_samples_per_prompt": "eval_n_samples_per_prompt", "data.input_key": "input_key",
    "data.label_key": "label_key", "data.output_key": "output_key", "data.prompt_key": "prompt_key",
    "data.chosen_key": "chosen_key", "data.rejected_key": "rejected_key", "data.input_template": "input_template",
    "data.apply_chat_template": "apply_chat_template", "data.tokenizer_chat_template": "tokenizer_chat_template",
    "data.image_key": "image_key", "data.multiturn": "multiturn", "data.max_images_per_prompt": "image_key",
    "logger.wandb.key": "use_wandb", "logger.wandb.org": "wandb_org", "logger.wandb.group": "wandb_group",
    "logger.wandb.project": "wandb_project", "logger.wandb.run_name": "wandb_run_name",
    "logger.tensorboard_dir": "use_tensorboard", "algo.dynamic_filtering_enable": "dynamic_filtering",
    "algo.dynamic_filtering_range": "dynamic_filtering_reward_range", "model.beta": "beta",
    "model.ipo_enable": "ipo", "model.label_smoothing": "label_smoothing", "model.nll_loss_coef": "nll_loss_coef",
    "model.pretrain_mode_enable": "pretrain_mode", "model.compute_fp32_loss_enable": "compute_fp32_loss",
    "model.margin_loss_enable": "margin_loss", "model.loss_type": "loss_type",
    "adam.lr": "learning_rate", "adam.betas": "adam_betas", "adam.weight_decay": "l2",
    "actor.adam.lr": "actor_learning_rate", "actor.adam.betas": "adam_betas", "actor.adam.weight_decay": "l2",
    "critic.adam.lr": "critic_learning_rate", "actor.optim": "optim", "critic.optim": "optim",
    "actor.lr_scheduler": "lr_scheduler", "actor.lr_warmup_ratio": "lr_warmup_ratio",
    "actor.min_lr_ratio": "min_lr_ratio", "actor.max_norm": "max_norm",
}
_SHARED = none("a critic trains as train says, but for critic.learning_rate")

TABLE: dict[str, Counterpart] = {
    **PLAIN,
    **{dotted: PLAIN[plain] for dotted, plain in _DOTTED.items()},
    "adam.eps": "train.adam_eps", "actor.adam.eps": "train.adam_eps",
    "actor.freeze_visual_encoder": none("prompts are texts"),
    "ckpt.best_metric_key": none("eval.stop_at ends a run at a score; a best checkpoint isn't chosen"),
    "data.dataloader_num_workers": none("there is no data loader: prompts are encoded once, at the start"),
    "ds.experts_implementation": none("experts are computed as transformers chooses"),
    **{f"critic.{name}": _SHARED for name in (
        "adam.betas", "adam.eps", "adam.weight_decay", "lr_scheduler", "lr_warmup_ratio", "min_lr_ratio", "max_norm")},
    **{f"{prefix}muon.{name}": _MUON for prefix in ("", "actor.", "critic.") for name in (
        "lr", "momentum", "ns_steps", "nesterov", "no_nesterov")},
}
