"""Configurations of other libraries, translated; the result is a configuration that is accepted here."""

from __future__ import annotations

import shlex

import pytest

from flux_ray import UserError
from flux_ray.__main__ import compose, main
from flux_ray.algo.check import check
from flux_ray.config import validate
from flux_ray.translate import translate

pytestmark = pytest.mark.unit

VERL = """\
set -x
export VLLM_USE_V1=1
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo data.train_files=$HOME/gsm8k/train.parquet data.train_batch_size=1024 \\
    data.max_prompt_length=512 data.max_response_length=1024 data.truncation='error' \\
    actor_rollout_ref.model.path=Qwen/Qwen3-8B actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.n=5 \\
    trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=-1 $@
"""
OPENRLHF = """\
ray job submit -- python3 -m openrlhf.cli.train_ppo_ray --pretrain OpenRLHF/Llama-3-8b --prompt_data my.jsonl \\
   --advantage_estimator reinforce --init_kl_coef 1e-3 --use_kl_loss --n_samples_per_prompt 4 \\
   --rollout_batch_size 128 --train_batch_size 256 --eps_clip_low_high 0.2 0.28 --generate_max_len 2048 \\
   --actor_learning_rate 5e-7 --zero_stage 3 --bf16 --packing_samples --vllm_num_engines 2
"""
TRL = """\
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/tldr
num_generations: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
max_completion_length: 200
learning_rate: 1.0e-5
adam_beta2: 0.95
lr_scheduler_type: constant_with_warmup
bf16: true
"""


def translated(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    translation = translate(file)
    return translation, [word for text in translation.overrides for word in shlex.split(text)]


def accepted(words):
    """The config that these overrides compose, checked."""
    configs = []
    compose([*words, "data.train=x"], then=configs.append)
    check(validate(configs[0]))
    return configs[0]


def test_verl(tmp_path):
    translation, words = translated(tmp_path, "run.sh", VERL)
    assert translation.library == "verl"
    config = accepted(words)
    assert (config.model.path, config.algo.name, config.rollout.group_size) == ("Qwen/Qwen3-8B", "grpo", 5)
    assert (config.batch.prompts_per_step, config.algo.mini_batches, config.checkpoint.every) == (1024, 4, 0)
    assert (config.algo.beta, config.algo.kl_estimator, config.algo.kl_coef) == (0.001, "k3", 0.0)
    assert (config.rollout.num_engines, config.train.num_ranks, config.cluster.colocate) == (4, 8, True)
    assert (config.algo.aggregation, config.algo.entropy_coef, config.algo.dual_clip) == ("token_mean", 0.0, 3.0)
    assert "$HOME/gsm8k/train.parquet" in " ".join(words), "the shell goes on replacing it"
    assert [name for name, _ in translation.without] == ["data.truncation"]


def test_the_shell_s_own_signs_stay(tmp_path):
    text = "x actor_rollout_ref.model.path=${BASE}/m data.train_files=~/d.parquet data.val_files=$HOME/e.parquet"
    translation, words = translated(tmp_path, "run.sh", text)
    assert '"model.path=$BASE/m"' in translation.overrides and '"eval.data=$HOME/e.parquet"' in translation.overrides
    config = accepted([*words, "rollout.group_size=2"])
    assert config.data.train == "x" and "~/d.parquet" in " ".join(words)


def test_without_a_kl_in_the_loss_verl_has_none(tmp_path):
    _, words = translated(tmp_path, "run.sh", "x algorithm.adv_estimator=grpo actor_rollout_ref.model.path=m "
                          "actor_rollout_ref.rollout.n=2")
    assert accepted(words).algo.beta == 0


def test_verl_with_a_critic(tmp_path):
    _, words = translated(tmp_path, "ppo.sh", "x actor_rollout_ref.model.path=m critic.optim.lr=2e-5")
    config = accepted(words)
    assert (config.algo.name, config.critic.learning_rate, config.algo.gae_lambda) == ("ppo", 2e-5, 1.0)


def test_openrlhf(tmp_path):
    translation, words = translated(tmp_path, "run.sh", OPENRLHF)
    assert translation.library == "openrlhf"
    config = accepted(words)
    assert (config.algo.name, config.algo.beta, config.algo.kl_coef) == ("reinforce_pp", 0.001, 0.0)
    assert (config.algo.clip_range, config.algo.clip_range_high, config.algo.mini_batches) == (0.2, 0.28, 2)
    assert (config.rollout.max_tokens, config.train.learning_rate, config.train.zero_stage) == (2048, 5e-7, 3)
    assert {name for name, _ in translation.without} == {"bf16", "packing_samples"}


def test_trl(tmp_path):
    translation, words = translated(tmp_path, "grpo.yaml", TRL)
    assert translation.library == "trl"
    config = accepted(words)
    assert (config.rollout.group_size, config.batch.prompts_per_step, config.algo.beta) == (4, 4, 0.0)
    assert (config.algo.aggregation, config.train.adam_betas, config.train.schedule) == (
        "token_mean", [0.9, 0.95], "constant")
    assert [name for name, _ in translation.without] == ["bf16"]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.yaml", "- 1", "a mapping of options is wanted"),
    ("a.yaml", "a: [", "while parsing"),
    ("a.sh", "echo hello", "no option of verl, OpenRLHF, TRL in it"),
    ("a.sh", "x --lr 'open", "can't be read"),
])
def test_what_cant_be_translated(tmp_path, name, text, said):
    with pytest.raises(UserError) as caught:
        translated(tmp_path, name, text)
    assert said in str(caught.value)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "run.sh"
    file.write_text(OPENRLHF)
    assert main(["translate", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("flux-ray train \\\n    ") and "#   bf16: model.dtype=bfloat16" in printed
    assert main(["translate"]) == 2 and main(["translate", str(tmp_path / "none")]) == 2
