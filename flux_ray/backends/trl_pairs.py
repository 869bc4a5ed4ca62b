"""Trains on preference pairs with TRL's DPOTrainer, on the tokens that our own run would have.

Takes:  a Config that `check_trl` gave, the pairs, a recorder.
Gives:  `make_pair_trainer`: TRL's trainer, ready to train.
Knows:  TRL's names of our objectives and metrics.
Never:  lets TRL encode the texts again: tokens may merge where a prompt ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ray.backends.trl_settings import PAIR_LOSSES, opening, optimizer_arguments
from flux_ray.config import PairsConfig
from flux_ray.data import PairSource
from flux_ray.model import load_tokenizer
from flux_ray.run.recorder import Recorder

if TYPE_CHECKING:
    import trl
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: TRL's metric ► ours. Any other is trl/NAME.
METRICS = {
    "loss": "train/loss", "rewards/chosen": "pairs/chosen_reward", "rewards/rejected": "pairs/rejected_reward",
    "rewards/margins": "pairs/margin", "rewards/accuracies": "pairs/accuracy", "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}


def make_pair_trainer(
    config: PairsConfig, pairs: PairSource, *, recorder: Recorder, model: str | PreTrainedModel, device: str,
) -> trl.DPOTrainer:
    """`model`: a path, or a model that another library opened."""
    import trl
    from datasets import Dataset

    class OnOurTokens(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
            return dataset

    settings = pair_arguments(config, longest=pairs.longest, device=device)
    if isinstance(model, str):
        settings["model_init_kwargs"] = opening(config)
    return OnOurTokens(
        model=model,
        ref_model=_reference(config.reference.path, opening(config)),
        args=trl.DPOConfig(output_dir=str(Path(str(config.run_dir), "trl")), **settings),
        train_dataset=Dataset.from_list(rows(pairs)),
        processing_class=load_tokenizer(config.model.tokenizer or str(config.model.path)),
        callbacks=[_recording(recorder)],
    )


def rows(pairs: PairSource) -> list[dict[str, list[int]]]:
    """Each pair in the form that TRL's collator takes."""
    return [
        {
            "prompt_ids": pair.chosen_ids[: pair.prompt_length].tolist(),
            "chosen_ids": pair.chosen_ids[pair.prompt_length :].tolist(),
            "rejected_ids": pair.rejected_ids[pair.prompt_length :].tolist(),
        }
        for pair in pairs.all()
    ]


def pair_arguments(config: PairsConfig, *, longest: int, device: str) -> dict[str, Any]:
    """Keyword arguments of DPOConfig."""
    update = config.batch.prompts_per_step
    budget = max(config.batch.max_tokens_per_micro_batch // (2 * longest), 1)
    most = min(max((config.batch.micro_batch_size or 2 * update) // 2, 1), budget)
    size = max(size for size in range(1, most + 1) if update % size == 0)
    return {
        **optimizer_arguments(config, device=device),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": update // size,
        "max_steps": config.driver.num_steps,
        "beta": config.algo.beta,
        "loss_type": [PAIR_LOSSES[config.algo.name]],
        "max_length": None,
        "logging_steps": 1,
    }


def _reference(path: str | None, arguments: dict[str, str]) -> PreTrainedModel | None:
    """The reference, if another model than the policy's own start, which TRL opens by itself."""
    if path is None:
        return None
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **arguments)


def _recording(recorder: Recorder) -> TrainerCallback:
    """Records TRL's logs as steps of our run."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        def on_log(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
            logs: dict[str, float] | None = None, **_: object,
        ) -> None:
            if logs and "rewards/margins" in logs:  # the last log of a training has only totals
                ours = {METRICS.get(name, f"trl/{name}"): float(value) for name, value in logs.items()}
                recorder.step(state.global_step - 1, ours)

    return Recording()
