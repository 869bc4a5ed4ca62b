"""What other projects' Python interfaces call an option.

Gives:  TABLE: their name ► ours, or one sentence that says what there is instead.
"""

from __future__ import annotations

from flux_ray.names.counterpart import Counterpart, none

_WANDB = none("observability.monitors=[wandb] writes to W&B, by its own variables (WANDB_PROJECT, WANDB_ENTITY, …)")

TABLE: dict[str, Counterpart] = {
    "batch_size": none("batch.prompts_per_step prompts make a step, each with rollout.group_size responses"),
    "mini_batch_size": none("algo.mini_batches is the number of updates of a step"),
    "checkpoint_interval": "checkpoint.every", "save_interval": "checkpoint.every", "eval_interval": "eval.every",
    "log_interval": none("every step is logged"),
    "wandb_project": _WANDB, "wandb_run_name": _WANDB, "use_wandb": _WANDB,
    "num_epochs": none("the length is in steps: driver.num_steps (an epoch is rows / batch.prompts_per_step)"),
    "max_samples": "data.max_rows",
    "percent": none("data.max_rows uses the first rows alone"),
    "max_seq_length": none("rollout.max_model_len is the longest text, prompt and response together"),
    "lam": "algo.gae_lambda", "vf_coef": none("the critic has an optimizer of its own: critic.learning_rate"),
    "column_mapping": none("columns are named one by one: data.prompt_column, data.answer_column, ..."),
    "reward_function": "reward.functions", "reward_functions": "reward.functions", "reward_funcs": "reward.functions",
    "split": "data.split",
    "config": none("FluxConfig.from_yaml(FILE) reads options from a file, on the command line --config FILE does"),
    "eval_batch_size": none("an evaluation asks for as many answers at once as its engines take"),
    "quantization": none("weights aren't quantized: train.lora.rank=16 trains an adapter alone"),
    "logging_level": none("RUN/run.log has everything; observability.progress=false shows nothing"),
    "kl_coefficient": none("algo.beta is the KL's weight in the loss, algo.kl_coef in the reward"),
    "kl_penalty": none("algo.beta is the KL's weight in the loss, algo.kl_coef in the reward"),
}
