"""TRL's GRPOTrainer on the same work.

Takes:  phases of lengths; threads, and the sequences of one forward pass.
Gives:  `vs_trl`, and `limit`, what it could be at most; the parts `trl_steps` (seconds a step, what was done) and
        `same_loss` (both losses of one batch).
Knows:  lengths are forced by the end token: kept out before a sequence's last place, the only choice there.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Measured
from benchmarks.session import COMPILED, EQUAL, UNEQUAL, Session
from benchmarks.work import GROUP_SIZE, NUM_PROMPTS, PROMPT_TOKENS, VOCAB, Phase, equal, make_data, options
from flux_ray.run.build import KEEP_MEMORY

GOALS = {EQUAL: ("vs_trl", ">= 1.8"), UNEQUAL: ("vs_trl_sigma_0.8", ">= 2.5")}
#: (threads, sequences of a forward pass): what is tried, and what was found best and is taken where time is short.
SETTINGS = ((1, 16), (2, 4), (2, 8), (2, 16), (2, 32), (2, 64))
BEST = (2, 16)
#: Runs of ours on both cores, of which the fastest counts; quick takes one that it has measured already.
OURS, QUICK_OURS = ("both_cores_compiled", "both_cores_asynchronous"), ("asynchronous",)
UNEQUAL_RUNS = 1  # of TRL: it waits for the longest, which is minutes a step
FEW_RUNS = 2  # to find a setting, or a limit, by
LONGEST = 64  # tokens of a response of the one batch that both compute the loss of
SAME = 1e-4  # of 1, or of the value: two float32 passes over one batch, summed in another order


def vs_trl(session: Session) -> list[Measured]:
    session = session.beside_peer()
    (threads, batch), theirs = _theirs(session)
    loss = session.part("same_loss")
    if any(abs(loss["ours"][name] - value) > SAME * max(abs(value), 1.0) for name, value in loss["trl"].items()):
        raise RuntimeError(f"ours and TRL's differ on one batch: {loss}")
    results = []
    for phase in theirs:
        name, goal = GOALS[phase]
        runs = {run: statistics.median(session.step_s(run, phase)) for run in (QUICK_OURS if session.quick else OURS)}
        best = min(runs, key=runs.__getitem__)
        steps, done = session.ours(best)[phase], theirs[phase]["work"]
        ours = {"sampled": round(steps["steps"][0]["rollout/tokens"]),
                "trained": sum(notes[0]["used"] for notes in steps["ranks"]),
                "scored": sum(notes[0]["scored"] for notes in steps["ranks"])}
        # Ours also scores what engines sample after an update where it is asynchronous: more work, never less.
        if any(ours[key] != done[key] for key in ("sampled", "trained")) or ours["scored"] < done["scored"]:
            raise RuntimeError(f"{phase}: the work of a step differs: ours {ours}, TRL's {done}")
        results.append(Measured.of(
            name, [s / runs[best] for s in theirs[phase]["seconds"]], unit="x", goal=goal, ours=best,
            ours_s={run: round(value, 3) for run, value in runs.items()}, trl_threads=threads, trl_batch=batch,
            trl_s=round(statistics.median(theirs[phase]["seconds"]), 3), work=done, loss=loss))
    return results


def limit(session: Session) -> list[Measured]:
    """TRL's step / half of the sum of the fastest bare parts: what two cores without any loss would give."""
    if EQUAL not in session.lengths:
        return []
    if session.quick:
        generation_s, training_s = session.floors()[EQUAL]
    else:
        asked: dict[str, Any] = {"phases": _few(session), "dtype": session.dtype}
        generation = session.part("vllm", enforce_eager=not COMPILED, **asked)
        training = session.part("deepspeed", our_layers=True, env=KEEP_MEMORY, **asked)
        generation_s, training_s = (statistics.median(of[EQUAL]) for of in (generation, training))
    _, theirs = _theirs(session)
    least_s = (generation_s + training_s) / 2
    return [Measured.of("vs_trl_limit", [s / least_s for s in theirs[EQUAL]["seconds"]], unit="x",
                        generation_s=round(generation_s, 3), training_s=round(training_s, 3))]


def _theirs(session: Session) -> tuple[tuple[int, int], dict[str, Any]]:
    """TRL's setting, and its steps with it by phase."""
    setting = session.peer_setting or (BEST if session.quick else _best(session))
    warm_up = int(EQUAL not in session.lengths)  # else it is warm
    phases = [phase if phase["name"] == EQUAL else phase | {"runs": UNEQUAL_RUNS, "warm_up": warm_up}
              for phase in session.phases()]
    return setting, _trl(session, *setting, phases)


def _best(session: Session) -> tuple[int, int]:
    """The setting with the fastest steps of equal lengths."""
    few = _few(session)
    seconds = {setting: statistics.median(_trl(session, *setting, few)[EQUAL]["seconds"]) for setting in SETTINGS}
    return min(seconds, key=seconds.__getitem__)


def _few(session: Session) -> list[dict[str, Any]]:
    """Steps of equal lengths, enough to find a setting by."""
    return [dataclasses.asdict(Phase(EQUAL, equal(session.tokens), 1, min(FEW_RUNS, session.runs)))]


def _trl(session: Session, threads: int, batch: int, phases: list[dict[str, Any]]) -> dict[str, Any]:
    return session.part("trl", phases=phases, dtype=session.dtype, threads=threads, batch=batch,
                        env={"OMP_NUM_THREADS": str(threads)})


def _trainer(folder: Path, work: Path, values: dict[str, Any], callback: Any) -> Any:
    """TRL's trainer of a config as our own backend makes it."""
    from flux_ray.driver.recorder import Recorder

    from flux_ray.backends.trl import make_trainer
    from flux_ray.config import PolicyGradientConfig, from_dict
    from flux_ray.data import PromptSource
    from flux_ray.model import load_tokenizer
    from flux_ray.observability.callbacks import as_callback
    from flux_ray.observability.run_folder import RunFolder
    from flux_ray.observability.terminal import Terminal

    config = from_dict(values | {"data.train": str(work / "data.jsonl"), "run_dir": str(work / "run")})
    assert isinstance(config, PolicyGradientConfig)
    run = RunFolder(work / "run")
    run.create(config, resume_step=None)
    prompts = PromptSource.from_config(config, load_tokenizer(str(folder / "29M")), context_length=2048)
    terminal = Terminal(io.StringIO(), enabled=False)
    recorder = Recorder(config, folder=run, terminal=terminal, callbacks=[as_callback(callback)])
    return make_trainer(config, prompts, recorder=recorder)


def trl_steps(folder: Path, work: Path, *, phases: list[dict[str, Any]], dtype: str, threads: int,
              batch: int) -> dict[str, Any]:
    """Phase ► seconds of each measured step, and the tokens of one: sampled, trained on, scored."""
    import torch

    torch.set_num_threads(threads)
    planned = [Phase(**phase) for phase in phases]
    make_data(work / "data.jsonl", planned)
    values = options(folder, dtype=dtype, phases=planned) | {
        "batch.micro_batch_size": batch, "batch.max_tokens_per_micro_batch": 10**9}
    counts = {"sampled": 0, "trained": 0, "scored": 0}
    steps: list[dict[str, Any]] = []

    def stepped(step: int, metrics: dict[str, float]) -> None:
        steps.append({"at_s": time.perf_counter(), **counts})

    trainer = _trainer(folder, work, values, stepped)
    _force(trainer.model, [phase.lengths for phase in planned for _ in range(phase.steps)], counts)
    _count(trainer, counts)
    steps.append({"at_s": time.perf_counter(), **counts})
    trainer.train()
    given, at = {}, 0
    for phase in planned:
        ends = steps[at + phase.warm_up : at + phase.steps + 1]
        pairs = list(itertools.pairwise(ends))
        given[phase.name] = {"seconds": [b["at_s"] - a["at_s"] for a, b in pairs],
                             "work": {key: pairs[0][1][key] - pairs[0][0][key] for key in counts}}
        at += phase.steps
    return given


def _force(model: Any, lengths_of_steps: list[list[int]], counts: dict[str, int]) -> None:
    """Let the model's `generate` give responses of these lengths, the end token included."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from tests.tiny import EOS_ID

    class Forced(LogitsProcessor):
        def __init__(self, lengths: list[int]) -> None:
            self._lengths = torch.tensor(lengths)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            last = self._lengths - 1 == input_ids.shape[1] - PROMPT_TOKENS
            scores[:, EOS_ID] = -math.inf
            scores[last] = -math.inf
            scores[last, EOS_ID] = 0.0
            return scores

    generate, left = model.generate, list(lengths_of_steps)

    def forced(*inputs: Any, **asked: Any) -> torch.Tensor:
        lengths = left.pop(0)
        model.generating = True
        try:
            ids = generate(*inputs, logits_processor=LogitsProcessorList([Forced(lengths)]), **asked)
        finally:
            model.generating = False
        ends = (ids[:, PROMPT_TOKENS:] == EOS_ID).int().argmax(1) + 1
        assert ends.tolist() == lengths, "a response is not as long as it was to be"
        counts["sampled"] += sum(lengths)
        return ids

    model.generate, model.generating = forced, False


def _count(trainer: Any, counts: dict[str, int]) -> None:
    """Tokens of sequences (not padding) that go through the model, with gradients and without; not generate's."""
    import torch

    def saw(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if not module.generating:
            counts["trained" if torch.is_grad_enabled() else "scored"] += int(named["attention_mask"].sum())

    trainer.model.register_forward_pre_hook(saw, with_kwargs=True)


def same_loss(folder: Path, work: Path) -> dict[str, dict[str, float]]:
    """Loss and norm of the gradient of a first step on one batch, in fp32: by our trainer, by TRL's."""
    phase = Phase("made", [LONGEST] * NUM_PROMPTS * GROUP_SIZE, 0, 1)
    values = options(folder, dtype="float32", phases=[phase]) | {"train.warmup_steps": 0, "train.max_grad_norm": 0.0}
    make_data(work / "data.jsonl", [phase])
    groups, scores = _made_batch()
    return {"ours": _our_loss(values, groups, scores), "trl": _their_loss(folder, work, values, groups, scores)}


def _made_batch() -> tuple[list[Any], list[Any]]:
    """Two groups of random responses of unequal lengths, with random rewards."""
    from flux_ray.records import FINISH_STOP, Prompt, RolloutGroup, ScoredGroup, Trajectory

    rng = np.random.default_rng(0)
    groups, scores = [], []
    for uid in range(2):
        lengths = PROMPT_TOKENS + rng.integers(8, LONGEST + 1, GROUP_SIZE)
        prompt_ids = rng.integers(3, VOCAB, PROMPT_TOKENS)
        made = []
        for n in lengths:
            ids = np.concatenate([prompt_ids, rng.integers(3, VOCAB, n - PROMPT_TOKENS)])
            mask = np.arange(n) >= PROMPT_TOKENS
            made.append(Trajectory(ids.astype(np.int32), mask, np.zeros(n, np.float32),
                                   np.where(mask, 0, -1).astype(np.int32), PROMPT_TOKENS, FINISH_STOP))
        rewards = rng.normal(size=GROUP_SIZE)
        prompt = Prompt(uid, uid, "", prompt_ids.astype(np.int32), {}, GROUP_SIZE, 0)
        groups.append(RolloutGroup(prompt, tuple(made)))
        scores.append(ScoredGroup(uid, rewards, rewards, {"made": rewards}, lengths, lengths - PROMPT_TOKENS,
                                  np.zeros(GROUP_SIZE, bool), 0))
    return groups, scores


def _our_loss(values: dict[str, Any], groups: list[Any], scores: list[Any]) -> dict[str, float]:
    from flux_ray.config import from_dict
    from flux_ray.train import Trainer
    from tests.train.ranks import free_port

    trainer = Trainer(from_dict(values), rank=0, world_size=1, master_address="127.0.0.1", master_port=free_port(),
                      device="cpu")
    metrics = trainer.train_step(groups=groups, scores=scores, reference_logprobs=None, step=0).metrics
    trainer.close()
    return {"loss": metrics["actor/loss"], "grad_norm": metrics["train/grad_norm"]}


def _their_loss(folder: Path, work: Path, values: dict[str, Any], groups: list[Any], scores: list[Any],
                ) -> dict[str, float]:
    import torch

    from flux_ray import algo

    rows = [trajectory for group in groups for trajectory in group.trajectories]
    ids = torch.zeros(len(rows), PROMPT_TOKENS + LONGEST, dtype=torch.long)
    mask = torch.zeros(len(rows), LONGEST, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : row.num_tokens] = torch.from_numpy(row.token_ids.astype(np.int64))
        mask[i, : row.num_tokens - PROMPT_TOKENS] = 1
    rewards = torch.tensor(np.concatenate([score.rewards for score in scores]), dtype=torch.float32)
    advantages, _ = algo.get_adv_estimator("grpo")(rewards[:, None], torch.ones(len(rows), 1, dtype=torch.bool),
                                                   index=torch.arange(len(rows)) // GROUP_SIZE)
    trainer = _trainer(folder, work, values, lambda step, metrics: None)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    loss = trainer._compute_loss(trainer.model.train(), {
        "prompt_ids": ids[:, :PROMPT_TOKENS], "prompt_mask": torch.ones(len(rows), PROMPT_TOKENS, dtype=torch.long),
        "completion_ids": ids[:, PROMPT_TOKENS:], "completion_mask": mask, "advantages": advantages[:, 0],
        "num_items_in_batch": mask.sum()})
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    return {"loss": float(loss), "grad_norm": float(torch.nn.utils.get_total_norm(gradients))}
