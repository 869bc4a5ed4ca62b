"""What verl's configuration calls an option (ppo_trainer.yaml and what it is composed of, January 2026).

Gives:  TABLE: their dotted name ► ours, or one sentence that says what there is instead; PATTERNS, for whole sections.
"""

from __future__ import annotations

from flux_ray.names.counterpart import Counterpart, Missing, none, values

_REPLAY = none("algo.router_replay=true takes the experts that the engine chose for each token (R3); a reference "
               "chooses by itself, and nothing is recorded in files")
_LOG_PROB = none("batch.max_tokens_per_micro_batch bounds each forward of the trainer, "
                 "reference.max_tokens_per_forward the reference's")
_WARMUP = none("the warm-up is in optimizer updates: train.warmup_steps")
_EPOCHS = none("the length is in steps: driver.num_steps (an epoch is rows / batch.prompts_per_step)")
_KL_LOSS = none("algo.beta is the KL's weight in the loss; 0: none")
_KL_REWARD = none("algo.kl_coef is the KL's weight in the reward; 0: none")
_GPUS = none("actors are placed by their number: rollout.num_engines, train.num_ranks, reference.num_actors")
_FOLDER = none("run_dir is the run's folder: checkpoints, model and metrics lie in it")
_REWARD_FUNCTION = none("rewards are named by reward.functions, your own as path/to/file.py:function")
_CORRECTION = none("algo.off_policy=tis or icepop corrects the trainer's policy against the sampler's")
_ATTENTION = none("model.layout says how samples lie in a micro-batch; model.attention which kernel reads them")
_AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean",
                 "seq-mean-token-sum-norm": "constant_length"}
_ESTIMATORS = {"gae": "ppo", "grpo": "grpo", "reinforce_plus_plus": "reinforce_pp",
               "reinforce_plus_plus_baseline": "reinforce_pp_baseline", "rloo": "rloo", "rloo_vectorized": "rloo",
               "grpo_vectorized": "grpo_vectorized"}

_ACTOR: dict[str, Counterpart] = {
    "optim.lr": "train.learning_rate", "optim.weight_decay": "train.weight_decay",
    "optim.betas": "train.adam_betas", "optim.clip_grad": "train.max_grad_norm",
    "optim.lr_warmup_steps": "train.warmup_steps", "optim.lr_warmup_steps_ratio": _WARMUP,
    "optim.lr_scheduler_type": values("train.schedule", {"constant": "constant", "cosine": "cosine"}),
    "optim.warmup_style": values("train.schedule", {"constant": "constant", "cosine": "cosine", "None": "constant"}),
    "optim.total_training_steps": "driver.num_steps",
    "ppo_mini_batch_size": none("algo.mini_batches is the number of updates of a step: batch.prompts_per_step over "
                                "verl's ppo_mini_batch_size"),
    "ppo_micro_batch_size": none("batch.max_tokens_per_micro_batch bounds a micro-batch by its tokens"),
    "ppo_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "use_dynamic_bsz": none("micro-batches are always packed by tokens: batch.max_tokens_per_micro_batch"),
    "ppo_max_token_len_per_gpu": "batch.max_tokens_per_micro_batch",
    "clip_ratio": "algo.clip_range", "clip_ratio_low": "algo.clip_range",
    "clip_ratio_high": "algo.clip_range_high", "clip_ratio_c": "algo.dual_clip",
    "policy_loss.loss_mode": values("algo.policy_loss", {
        "vanilla": "ppo", "gspo": "gspo", "cispo": "cispo"}),
    "loss_agg_mode": values("algo.aggregation", _AGGREGATIONS),
    "loss_scale_factor": none("algo.aggregation=constant_length divides by rollout.max_tokens"),
    "entropy_coeff": "algo.entropy_coef", "calculate_entropy": none("the entropy is always measured"),
    "use_kl_loss": _KL_LOSS, "kl_loss_coef": "algo.beta",
    "kl_loss_type": values("algo.kl_estimator", {
        "kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}),
    "ppo_epochs": "algo.epochs", "shuffle": none("mini-batches are taken in the order of the step's groups"),
    "grad_clip": "train.max_grad_norm", "strategy": none("training is sharded by DeepSpeed: train.zero_stage"),
    "rollout_n": "rollout.group_size", "use_remove_padding": _ATTENTION,
    "router_replay.mode": values("algo.router_replay", {"R3": True, "disabled": False}),
    "use_torch_compile": none("PyTorch's own setting; it isn't an option here"),
    "use_fused_kernels": none("log-probs never hold a batch x vocabulary tensor: model.logprob_chunk_tokens"),
    "data_loader_seed": none("one seed for everything: seed"),
    "freeze_vision_tower": none("prompts are texts"),
}

_ROLLOUT: dict[str, Counterpart] = {
    "name": none("vLLM generates"), "mode": none("engines always serve asynchronously"),
    "temperature": "rollout.temperature", "top_p": "rollout.top_p",
    "top_k": values("rollout.top_k", {"-1": 0}), "n": "rollout.group_size",
    "prompt_length": "data.max_prompt_tokens", "response_length": "rollout.max_tokens",
    "dtype": none("an engine has the policy's type: model.dtype"), "ignore_eos": "rollout.ignore_eos",
    "gpu_memory_utilization": "rollout.engine_args.gpu_memory_utilization",
    "enforce_eager": "rollout.engine_args.enforce_eager",
    "tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "data_parallel_size": none("rollout.num_engines engines share the prompts"),
    "max_num_batched_tokens": "rollout.engine_args.max_num_batched_tokens",
    "max_model_len": "rollout.max_model_len", "max_num_seqs": "rollout.max_num_seqs",
    "enable_chunked_prefill": "rollout.engine_args.enable_chunked_prefill",
    "enable_prefix_caching": "rollout.engine_args.enable_prefix_caching",
    "load_format": none("an engine gets its first weights from the trainer"),
    "do_sample": none("responses are always sampled: rollout.temperature"),
    "over_sample_rate": "filter.oversample",
    "free_cache_engine": none("an engine keeps its memory; cluster.colocate=true shares a GPU by fractions"),
    "val_kwargs.n": "eval.num_samples", "val_kwargs.temperature": "eval.temperature",
    "val_kwargs.do_sample": none("eval.temperature=0 is greedy"),
    "calculate_log_probs": none("the sampler's log-probs are always kept"),
    "agent.num_workers": "rollout.num_workers",
    "agent.default_agent_loop": none("an agent is a rollout function: rollout.function=my.py:rollout"),
    "checkpoint_engine.backend": values("weights.backend", {"nccl": "nccl", "naive": "auto"}),
    "checkpoint_engine.update_weights_bucket_megabytes": "weights.bucket_mib",
    "quantization": "rollout.engine_args.quantization",
    "enable_rollout_routing_replay": "rollout.return_experts",
}

_MODEL: dict[str, Counterpart] = {
    "path": "model.path", "tokenizer_path": "model.tokenizer",
    "trust_remote_code": none("models with code of their own aren't loaded"),
    "enable_gradient_checkpointing": "train.gradient_checkpointing",
    "lora_rank": "train.lora.rank", "lora_alpha": "train.lora.alpha", "target_modules": "train.lora.targets",
    "lora_adapter_path": none("train.lora starts a new adapter; resume=RUN goes on with one"),
    "use_remove_padding": _ATTENTION,
    "use_liger": none("log-probs never hold a batch x vocabulary tensor: model.logprob_chunk_tokens"),
    "use_fused_kernels": none("log-probs never hold a batch x vocabulary tensor: model.logprob_chunk_tokens"),
    "custom_chat_template": none("the chat template is the tokenizer's: save it there"),
    "external_lib": none("plugins=[FILE.py] are imported in every process"),
    "enable_activation_offload": none("train.gradient_checkpointing=true and train.deepspeed save memory"),
}

_TOP: dict[str, Counterpart] = {
    "data.train_files": "data.train", "data.val_files": "eval.data", "data.prompt_key": "data.prompt_column",
    "data.train_max_samples": "data.max_rows", "data.val_max_samples": "eval.max_rows",
    "data.reward_fn_key": none("one set of rewards scores every row: reward.functions"),
    "data.max_prompt_length": "data.max_prompt_tokens", "data.max_response_length": "rollout.max_tokens",
    "data.train_batch_size": "batch.prompts_per_step",
    "data.val_batch_size": none("an evaluation asks for all its prompts at once"),
    "data.shuffle": "data.shuffle", "data.seed": none("one seed for everything: seed"),
    "data.tokenizer": "model.tokenizer",
    "data.filter_overlong_prompts": values("data.on_bad_row", {"True": "skip", "False": "stop"}),
    "data.filter_overlong_prompts_workers": none("prompts are encoded once, at the start"),
    "data.truncation": none("a prompt that is too long stops the run, or is left out: data.on_bad_row"),
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "data.return_raw_chat": none("a prompt is a text or a list of chat messages"),
    "algorithm.adv_estimator": values("algo.name", _ESTIMATORS),
    "algorithm.gamma": "algo.gamma", "algorithm.lam": "algo.gae_lambda",
    "algorithm.norm_adv_by_std_in_grpo": "algo.normalize_by_std",
    "algorithm.use_kl_in_reward": _KL_REWARD, "algorithm.kl_ctrl.kl_coef": "algo.kl_coef",
    "algorithm.kl_penalty": none("the KL in the reward is k1"),
    "algorithm.kl_ctrl.type": none("algo.kl_target adapts the KL's weight in the reward; without it it is fixed"),
    "algorithm.kl_ctrl.horizon": "algo.kl_horizon", "algorithm.kl_ctrl.target_kl": "algo.kl_target",
    "algorithm.filter_groups.enable": values("filter.reward", {"True": "task", "False": None}),
    "algorithm.filter_groups.metric": none("filter.reward names the reward that must differ in a group"),
    "algorithm.filter_groups.max_num_gen_batches": "filter.max_batches",
    "algorithm.rollout_correction.rollout_is_threshold": "algo.tis_cap",
    "algorithm.rollout_correction.rollout_is": values("algo.off_policy_level", {
        "token": "token", "sequence": "sequence"}),
    "critic.optim.lr": "critic.learning_rate", "critic.model.path": "critic.path",
    "critic.cliprange_value": "critic.clip_range",
    "reward_model.enable": none("a reward model is one of reward.functions, as model:PATH"),
    "reward_model.model.path": none("a reward model is one of reward.functions, as model:PATH"),
    "reward_model.num_workers": "reward.num_workers", "reward_model.reward_manager": _REWARD_FUNCTION,
    "reward_model.overlong_buffer.enable": none("reward.overlong_penalty above 0 is on"),
    "reward_model.overlong_buffer.len": "reward.overlong_tokens",
    "reward_model.overlong_buffer.penalty_factor": "reward.overlong_penalty",
    "custom_reward_function.path": _REWARD_FUNCTION, "custom_reward_function.name": _REWARD_FUNCTION,
    "trainer.total_epochs": _EPOCHS, "trainer.total_training_steps": "driver.num_steps",
    "trainer.save_freq": values("checkpoint.every", {"-1": 0}), "trainer.test_freq": values("eval.every", {"-1": 0}),
    "trainer.val_before_train": none("every run with eval.data evaluates at its start"),
    "trainer.critic_warmup": "critic.warmup_steps", "trainer.project_name": _FOLDER,
    "trainer.experiment_name": _FOLDER, "trainer.default_local_dir": "run_dir", "trainer.default_hdfs_dir": _FOLDER,
    "trainer.resume_mode": none("resume=RUN goes on"), "trainer.resume_from_path": "resume",
    "trainer.max_actor_ckpt_to_keep": "checkpoint.keep", "trainer.max_critic_ckpt_to_keep": "checkpoint.keep",
    "trainer.logger": none("metrics.jsonl is always written; observability.monitors=[wandb] adds W&B, and others"),
    "trainer.log_val_generations": "observability.samples_per_step",
    "trainer.rollout_data_dir": none("observability.samples_per_step samples of each step are in RUN/samples.jsonl"),
    "trainer.n_gpus_per_node": _GPUS, "trainer.nnodes": _GPUS,
    "trainer.device": values("cluster.device", {"cuda": "cuda", "cpu": "cpu"}),
    "trainer.balance_batch": none("ranks always get groups of about as many tokens"),
    "trainer.val_only": none("FluxTrainer.evaluate measures without training"),
}

TABLE: dict[str, Counterpart] = {
    **{f"actor_rollout_ref.actor.{name}": ours for name, ours in _ACTOR.items()},
    **{f"actor_rollout_ref.rollout.{name}": ours for name, ours in _ROLLOUT.items()},
    **{f"actor_rollout_ref.model.{name}": ours for name, ours in _MODEL.items()},
    **_TOP,
}

#: Pattern of their names ► what there is instead, for what TABLE hasn't. The first that fits counts.
PATTERNS: dict[str, Missing] = {
    "*.fsdp_config.*": none("training is sharded by DeepSpeed: train.zero_stage, train.deepspeed"),
    "*.megatron.*": none("training is sharded by DeepSpeed: train.zero_stage, train.deepspeed"),
    "*.log_prob_*": _LOG_PROB,
    "*.router_replay.*": _REPLAY,
    "*expert_parallel_size": none("rollout.engine_args.enable_expert_parallel=true splits an engine by experts, "
                                  "train.zero_stage the training"),
    "*pipeline_model_parallel_size": none("an engine is split by rollout.tensor_parallel_size alone"),
    "*ulysses_sequence_parallel_size": none("a sequence stays on one rank: there is no sequence parallelism"),
    "*.mtp*": none("no further tokens are predicted"),
    "*.checkpoint.*": none("a checkpoint always holds model, optimizer and position: checkpoint.every"),
    "*entropy_from_logits_with_chunking": none("the entropy is always computed in chunks: model.logprob_chunk_tokens"),
    "*entropy_checkpointing": none("the entropy is always computed in chunks: model.logprob_chunk_tokens"),
    "*.multi_turn.*": none("turns and tools are part of a rollout function: rollout.function=my.py:rollout"),
    "*.policy_loss.*": none("algo.policy_loss takes one of your own (docs: your own algorithm)"),
    "*.optim.*": none("the optimizer is AdamW (train.adam_betas, train.adam_eps, train.weight_decay)"),
    "*.custom_async_server.*": none("vLLM generates"),
    "*.engine_kwargs*": none("rollout.engine_args takes vLLM's engine options"),
    "actor_rollout_ref.actor.*": none("see `flux-ray train --help`, sections algo and train"),
    "actor_rollout_ref.ref.*": none("the reference has a section of its own: reference.path, reference.num_actors"),
    "actor_rollout_ref.rollout.val_kwargs.*": none("an evaluation samples as training does, at eval.temperature"),
    "actor_rollout_ref.rollout.prometheus.*": none("metrics lie in RUN/metrics.jsonl"),
    "actor_rollout_ref.rollout.*": none("see section rollout of `flux-ray train --help`; rollout.engine_args takes "
                                        "vLLM's own"),
    "actor_rollout_ref.model.*": none("see `flux-ray train --help`, section model"),
    "actor_rollout_ref.*": none("see `flux-ray train --help`"),
    "critic.*": none("a critic trains as train says, but for critic.learning_rate, clip_range and warmup_steps"),
    "reward_model.*": none("a reward model is one of reward.functions, as model:PATH; reward has its other options"),
    "reward_manager.*": _REWARD_FUNCTION, "custom_reward_function.*": _REWARD_FUNCTION,
    "algorithm.rollout_correction.*": _CORRECTION, "algorithm.*": none("see `flux-ray train --help`, section algo"),
    "data.image_*": none("prompts are texts"), "data.video_key": none("prompts are texts"),
    "data.custom_cls.*": none("data.train is a file or a hub data set; FluxTrainer.fit takes rows in memory"),
    "data.*": none("see `flux-ray train --help`, section data"),
    "trainer.*": none("see `flux-ray train --help`"),
    "transfer_queue.*": none("groups stay with the rollout worker that made them"),
    "ray_kwargs.*": none("cluster.address names a Ray that runs; without it the run starts its own"),
    "global_profiler.*": none("driver/*_s in metrics.jsonl say where the time went"),
}
