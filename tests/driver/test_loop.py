"""The loop's own promises, on actors in this process: what is dropped, refilled, referenced, trained on and told."""

from __future__ import annotations

import asyncio
import io
import json
import random

import pytest

from flux_ray.cluster.group import ActorError
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.config import check_values, from_dict
from flux_ray.data import PromptSource
from flux_ray.errors import UserError
from flux_ray.observability.callbacks import Callback, as_callback
from flux_ray.observability.run_folder import EVAL, METRICS, SAMPLES, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.records import LoopState
from flux_ray.run.checkpoint import load, whole
from flux_ray.run.recorder import Recorder
from tests.fakes.local import Parts, train
from tests.house.documented import undocumented
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit


def run(tmp_path, rewards_of, *, callbacks=(), seconds_of=None, deadly=(), lost=(), done=0, version=-1,
        gap_of=None, terminal=None, rows="", checkpoint=None, **values) -> Parts:
    """Three steps of four prompts, of which some are `done`; gives what the parts saw. metrics.jsonl is in tmp_path."""
    config = from_dict({"batch.prompts_per_step": 4, "rollout.group_size": 2, "driver.num_steps": 3,
                        "rollout.max_tokens": 4, **values})
    folder = RunFolder(tmp_path)
    folder.create(config, resume_step=done or None)
    recorder = Recorder(config, folder=folder, terminal=Terminal(terminal or io.StringIO(), enabled=True),
                        callbacks=callbacks)
    sums = rows or [f"{i}+1=" for i in range(9)]
    prompts = PromptSource.from_config(config, tiny_tokenizer(), context_length=64, prompts=sums)
    parts = Parts(rewards_of, seconds_of=seconds_of, deadly=set(deadly), lost=set(lost), gap_of=gap_of)
    start = LoopState(step=done, next_uid=4 * done, version=version) if checkpoint is None else load(checkpoint)
    kept = checkpoint / ROLLOUT if checkpoint is not None else None
    asyncio.run(asyncio.wait_for(train(config, parts, prompts=prompts, recorder=recorder, start=start, kept=kept), 30))
    return parts


def first_cause(error: BaseException) -> BaseException:
    """What the user is told of a run that failed."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def differs_but_every_third(uid):
    return [1, 1] if uid % 3 == 0 else [1, 0]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_dropped_groups_are_refilled_and_never_referenced_or_trained_on(tmp_path, max_staleness):
    parts = run(tmp_path, differs_but_every_third, **{"filter.reward": "task", "driver.max_staleness": max_staleness})
    assert all(len(batch) == 4 for batch in parts.trained) and len(parts.trained) == 3
    seen = {uid for batch in parts.trained for uid in batch}
    assert len(seen) == 12 and not any(uid % 3 == 0 for uid in seen)
    assert seen <= set(parts.referenced) and not any(uid % 3 == 0 for uid in parts.referenced)
    lines = read_lines(tmp_path / METRICS)
    assert sum(line["filter/dropped_same_reward"] for line in lines) == lines[-1]["driver/groups_dropped"] >= 5
    assert lines[0]["filter/acceptance_rate"] < 1


def at_random(seed: int):
    chance = random.Random(seed)
    return lambda prompt: 0.02 * chance.random()


ASYNCHRONOUS = {"driver.max_staleness": 1, "driver.deterministic": True, "driver.num_steps": 6, "filter.reward": "task",
                "rollout.num_workers": 2}
TIMES = ("driver/step_s", "driver/wait_s", "driver/write_s", "train/step_s", "weights/publish_s", "rollout/s",
         "rollout/tokens_per_s", "reward/group_s", "reference/group_s")


def without_times(folder) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_lines(folder / METRICS)]


def test_a_deterministic_run_does_not_depend_on_which_group_was_faster(tmp_path):
    runs = [run(tmp_path / str(seed), differs_but_every_third, seconds_of=at_random(seed), **ASYNCHRONOUS)
            for seed in range(3)]
    assert runs[0].trained == runs[1].trained == runs[2].trained
    assert max(line["driver/staleness_max"] for line in read_lines(tmp_path / "0" / METRICS)) == 1, "asynchronous"
    assert without_times(tmp_path / "0") == without_times(tmp_path / "1") == without_times(tmp_path / "2")


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_was_finished_is_not_sampled_again_after_a_resume(tmp_path, deterministic):
    given = ASYNCHRONOUS | {"driver.deterministic": deterministic, "checkpoint.every": 1, "checkpoint.keep": 9}
    undisturbed = run(tmp_path / "run", differs_but_every_third, seconds_of=at_random(0), **given)
    checkpoint = next(one for one in whole(tmp_path / "run" / "checkpoints") if load(one).kept)
    state = load(checkpoint)
    kept = {one.uid for one in state.kept}
    assert kept <= set(state.unfinished)
    resumed = run(tmp_path / "resumed", differs_but_every_third, seconds_of=at_random(1), checkpoint=checkpoint,
                  **given)
    assert not kept & set(resumed.rolled) and kept <= {uid for batch in resumed.trained for uid in batch}
    assert all(resumed.sampled[uid] == undisturbed.sampled[uid] for uid in kept), "token for token"
    assert max(line["driver/staleness_max"] for line in read_lines(tmp_path / "resumed" / METRICS)) == 1, "the bound"
    if deterministic:
        assert resumed.trained == undisturbed.trained[state.step:]


def test_a_kept_group_whose_worker_dies_is_sampled_again(tmp_path):
    given = ASYNCHRONOUS | {"checkpoint.every": 2, "checkpoint.keep": 9}
    run(tmp_path / "run", differs_but_every_third, **given)
    checkpoint = whole(tmp_path / "run" / "checkpoints")[0]
    lost = load(checkpoint).kept[0].uid
    resumed = run(tmp_path / "resumed", differs_but_every_third, lost=[lost], checkpoint=checkpoint, **given)
    assert lost in resumed.rolled and lost in {uid for batch in resumed.trained for uid in batch}


@pytest.mark.parametrize("oversample", [0.5, 2.0])
def test_over_sampling_changes_no_synchronous_batch(tmp_path, oversample):
    """Two groups of three are dropped; spares stand in for them, and what is superfluous starts again."""
    rewards = lambda uid: [1, 0] if uid % 3 == 0 else [1, 1]  # noqa: E731
    given = {"filter.reward": "task"}
    plain = run(tmp_path / "a", rewards, **given)
    spared = run(tmp_path / "b", rewards, **given, **{"filter.oversample": oversample})
    assert plain.trained == spared.trained == [[0, 3, 6, 9], [12, 15, 18, 21], [24, 27, 30, 33]]
    lines = read_lines(tmp_path / "b" / METRICS)
    assert all(line["filter/length_issued"] == 1 and line["filter/rate_same_reward"] > 0.5 for line in lines)
    if oversample > 1:
        assert sum(line["filter/surplus"] for line in lines) > 0
        assert len(spared.rolled) > len(plain.rolled)


def test_what_is_superfluous_is_stopped_where_it_runs(tmp_path):
    """Every other prompt of the first three would take an hour: it is a spare, and begins again as somebody's turn."""
    hours: set[int] = set()

    def seconds_of(prompt):
        slow = prompt.uid in (4, 5) and prompt.uid not in hours
        hours.update([prompt.uid])
        return 3600 if slow else 0

    parts = run(tmp_path, lambda uid: [1, 0], seconds_of=seconds_of, **{"filter.reward": "task",
                                                                     "filter.oversample": 0.5})
    assert parts.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert parts.abandoned[:2] == [4, 5]
    line = read_lines(tmp_path / METRICS)[0]
    assert (line["filter/surplus"], line["filter/surplus_accepted"]) == (2, 0)


def test_what_is_accepted_and_superfluous_is_counted_by_itself(tmp_path):
    """Spares that are done before the batch is: not trained on in this step, and not counted as if they were."""
    parts = run(tmp_path, lambda uid: [1, 0], seconds_of=lambda prompt: 0.3 * (prompt.uid == 3),
                **{"filter.reward": "task", "filter.oversample": 1.0})
    assert parts.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    line = read_lines(tmp_path / METRICS)[0]
    assert line["filter/surplus_accepted"] >= 1 and line["filter/acceptance_rate"] == 1
    assert line["filter/length_surplus"] == line["filter/length_trained"] == 1


@pytest.mark.parametrize("num_engines", [1, 3])
def test_a_group_that_is_split_has_the_same_samples(tmp_path, num_engines):
    given = {"rollout.group_size": 5, "rollout.num_engines": num_engines}
    rewards = lambda uid: [1, 0, 0, 1, 0]  # noqa: E731
    whole = run(tmp_path / "whole", rewards, **given)
    for parts in (2, 5, 9):
        split = run(tmp_path / str(parts), rewards, seconds_of=lambda prompt: prompt.seed % 7 / 500, **given,
                    **{"rollout.split_groups": parts})
        assert split.sampled == whole.sampled, "in whatever order the parts come"
    assert len({tuple(tokens) for tokens in whole.sampled.values()}) > 1


def test_without_a_filter_all_are_trained_on_in_order(tmp_path):
    parts = run(tmp_path, differs_but_every_third)
    assert parts.trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_filter_that_nothing_passes_stops_the_run(tmp_path):
    with pytest.raises(BaseExceptionGroup) as caught:
        run(tmp_path, lambda uid: [0, 0], **{"filter.reward": "task", "filter.max_batches": 3})
    first = str(first_cause(caught.value))
    assert "9 of 9 groups drawn since the last step were dropped (same_reward 9): acceptance rate 0.0%" in first


def test_failed_rewards_are_dropped_where_the_user_says_so_and_have_the_same_limit(tmp_path):
    fails = lambda uid: ArithmeticError("no") if uid in (1, 2) else [1, 0]  # noqa: E731
    parts = run(tmp_path, fails, **{"reward.on_failure": "drop"})
    assert sorted(parts.trained[0]) == [0, 3, 4, 5]
    assert read_lines(tmp_path / METRICS)[0]["filter/dropped_reward_failed"] == 2
    with pytest.raises(BaseExceptionGroup):
        run(tmp_path / "all", lambda uid: ArithmeticError("no"), **{"reward.on_failure": "drop"})
    with pytest.raises(BaseExceptionGroup) as caught:
        run(tmp_path / "stop", fails)
    error = first_cause(caught.value)
    assert isinstance(error, ActorError) and (error.role, error.index) == ("reward", 0)


def test_an_evaluation_counts_the_rewards_that_failed(tmp_path):
    fails = lambda uid: ArithmeticError("no") if uid in (1, 2) else [1, 0]  # noqa: E731
    run(tmp_path / "drop", fails, **{"reward.on_failure": "drop", "eval.every": 1})
    for line in read_lines(tmp_path / "drop" / EVAL):
        assert (line["eval/prompts"], line["eval/failed"], line["eval/mean"]) == (7, 2, 0.5)
        assert len(line["answers"]) == 7
    with pytest.raises(BaseExceptionGroup) as caught:
        run(tmp_path / "stop", fails, **{"eval.every": 1})
    assert isinstance(first_cause(caught.value), ActorError)
    with pytest.raises(BaseExceptionGroup) as caught:
        run(tmp_path / "all", lambda uid: ArithmeticError("no"), **{"reward.on_failure": "drop", "eval.every": 1})
    error = first_cause(caught.value)
    assert isinstance(error, RuntimeError) and "evaluation at step 0: every reward failed" in str(error)


def test_an_evaluation_of_several_sets_tells_of_each_and_of_all(tmp_path):
    """Prompts are numbered through the sets: those of the first have uids below 2."""
    (tmp_path / "a.txt").write_text("1+1=\n1+2=\n")
    (tmp_path / "b.txt").write_text("2+1=\n2+2=\n2+3=\n2+4=\n")
    sets = {"first": str(tmp_path / "a.txt"), "second": str(tmp_path / "b.txt")}
    run(tmp_path / "run", lambda uid: [1, 0], rows=sets, **{"eval.every": 1, "data.shuffle": False})
    for line in read_lines(tmp_path / "run" / EVAL):
        assert line["eval/prompts"] == 6 and line["eval/mean"] == line["eval/first/mean"] == 0.5
        assert {"eval/second/mean", "eval/second/task_mean", "eval/first/response_length_mean"} <= line.keys()


def test_callbacks_see_each_step_as_it_is_written_and_can_end_the_run(tmp_path):
    seen = []
    run(tmp_path / "a", differs_but_every_third, callbacks=[as_callback(lambda step, m: seen.append((step, m)))])
    lines = read_lines(tmp_path / "a" / METRICS)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [{"step": step, **metrics} for step, metrics in seen] == lines

    def stop(step, metrics):
        raise KeyError("enough")

    with pytest.raises(BaseExceptionGroup):
        run(tmp_path / "b", differs_but_every_third, callbacks=[as_callback(stop)])
    assert len(read_lines(tmp_path / "b" / METRICS)) == 1


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_time_line_of_a_chosen_step_is_written(tmp_path, max_staleness):
    run(tmp_path, lambda uid: [1, 0], seconds_of=lambda prompt: 0.01 * (1 + prompt.uid % 4), **{
        "observability.trace_steps": [1, 77], "driver.max_staleness": max_staleness, "rollout.num_engines": 2})
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "step-000001.json"
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) >= {"driver", "engine 0", "engine 1", "rollout worker 0"}
    sampled = [event for event in events if event["name"] == "generate"]
    assert len(sampled) == 4 and all(event["dur"] >= 9_000 for event in sampled)
    assert {"wait for groups", "train", "publish weights"} <= {
        event["name"] for event in events if event["ph"] == "X" and names[event["pid"]] == "driver"}


class Asks(Callback):
    """Asks after step 2 for a checkpoint and an evaluation; after that evaluation, or after step `last`, for the end.
    """

    def __init__(self, *, last: int | None = None) -> None:
        self._last = last

    def on_step(self, step, metrics):
        if step == 1:
            self.control.save()
            self.control.evaluate()
        if step == self._last:
            self.control.stop("it is enough")

    def on_evaluation(self, step, metrics):
        if step == 2 and self._last is None:
            self.control.save()
            self.control.stop()


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_callback_asks_for_a_checkpoint_an_evaluation_and_the_end(tmp_path, max_staleness):
    given = {"driver.num_steps": 9, "driver.max_staleness": max_staleness, "eval.every": 100}
    shown = io.StringIO()
    run(tmp_path / "a", differs_but_every_third, callbacks=[Asks(last=3)], terminal=shown, **given)
    assert [line["step"] for line in read_lines(tmp_path / "a" / METRICS)] == [0, 1, 2, 3]
    assert [line["step"] for line in read_lines(tmp_path / "a" / EVAL)] == [0, 2, 4]   # the end is evaluated too
    assert [load(path).step for path in whole(tmp_path / "a" / "checkpoints")] == [2]
    assert "a callback has ended the run: it is enough" in shown.getvalue()
    run(tmp_path / "b", differs_but_every_third, callbacks=[Asks()], **given)
    assert [line["step"] for line in read_lines(tmp_path / "b" / METRICS)] == [0, 1]
    assert [line["step"] for line in read_lines(tmp_path / "b" / EVAL)] == [0, 2]
    assert [load(path).step for path in whole(tmp_path / "b" / "checkpoints")] == [2]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_ends_at_the_evaluation_that_reaches_its_level(tmp_path, max_staleness):
    """Rewards are half right until four steps are done; evaluations are at every second step."""
    done = []
    given = {"driver.num_steps": 20, "driver.max_staleness": max_staleness, "eval.every": 2, "eval.stop_at": 0.8}
    run(tmp_path / "later", lambda uid: [1, 1] if len(done) >= 4 else [1, 0], callbacks=[noting(done)], **given)
    assert [line["step"] for line in read_lines(tmp_path / "later" / METRICS)] == [0, 1, 2, 3] == done
    evaluations = read_lines(tmp_path / "later" / EVAL)
    assert [(line["step"], line["eval/task_mean"]) for line in evaluations] == [(0, 0.5), (2, 0.5), (4, 1.0)]
    assert run(tmp_path / "at once", lambda uid: [1, 1], **given).trained == []


def test_a_run_ends_where_evaluations_get_no_better(tmp_path):
    """Rewards are right half the time until two steps are done, always for two more, then half the time again."""
    done = []
    given = {"driver.num_steps": 30, "eval.every": 2, "eval.patience": 3, "checkpoint.best": "eval/task_mean"}
    run(tmp_path / "a", lambda uid: [1, 1] if 2 <= len(done) < 4 else [1, 0], callbacks=[noting(done)], **given)
    evaluations = read_lines(tmp_path / "a" / EVAL)
    assert [(line["step"], line["eval/task_mean"]) for line in evaluations] == [
        (0, 0.5), (2, 1.0), (4, 0.5), (6, 0.5), (8, 0.5)]
    done.clear()
    run(tmp_path / "least", lambda uid: [1, 0], callbacks=[noting(done)],
        **{**given, "eval.patience": 1, "checkpoint.best": "-eval/task_mean"})
    assert done == [0, 1], "as good as the best is no better"


def test_patience_needs_evaluations_and_a_metric():
    with pytest.raises(UserError, match=r"eval.patience=2 needs checkpoint.best"):
        check_values(from_dict({"eval.patience": 2, "eval.every": 1, "eval.data": "e"}))
    with pytest.raises(UserError, match=r"eval.patience=2 needs eval.every"):
        check_values(from_dict({"eval.patience": 2, "eval.data": "e", "checkpoint.best": "eval/mean"}))


@pytest.mark.parametrize("num_samples", [1, 4])
def test_an_evaluation_of_several_samples_tells_what_k_of_them_reach(tmp_path, num_samples):
    rewards = [1, 0, 0, 1][:num_samples]
    run(tmp_path, lambda uid: rewards, **{"eval.every": 1, "eval.num_samples": num_samples, "rollout.group_size": 4})
    line = read_lines(tmp_path / EVAL)[0]
    told = {name for name in line if "@" in name and not name.endswith(("_low", "_high"))}
    if num_samples == 1:
        assert told == set() and line["eval/task_mean_low"] == line["eval/task_mean"] == 1
        return
    assert told == {f"eval/{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4)}
    assert line["eval/pass@1"] == 0.5 and line["eval/pass@2"] == pytest.approx(5 / 6)
    assert line["eval/pass@4"] == line["eval/pass@4_low"] == 1.0
    assert undocumented(line) == []


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_no_prompt_starts_that_no_step_is_left_for(tmp_path, max_staleness):
    """What nobody will train on could end the run before its model is saved."""
    fails = lambda uid: ArithmeticError("no") if uid >= 12 else [1, 0]  # noqa: E731
    parts = run(tmp_path, fails, **{"driver.max_staleness": max_staleness})
    assert sorted(uid for batch in parts.trained for uid in batch) == list(range(12))


def test_a_resumed_run_makes_up_for_an_evaluation_that_it_was_ended_in(tmp_path):
    given = {"eval.every": 2}
    run(tmp_path / "whole", lambda uid: [1, 0], **given)
    steps = lambda folder: [line["step"] for line in read_lines(folder / EVAL)]  # noqa: E731
    assert steps(tmp_path / "whole") == [0, 2, 3]
    for done, again, made in ((2, [], [2, 3]), (1, [], [2, 3]), (3, [], [3]), (2, ["resume"], [3])):
        folder = tmp_path / f"{done}{again}"
        resumed = {"resume": str(tmp_path / "whole")} if again else {}
        assert run(folder, lambda uid: [1, 0], done=done, **given, **resumed).trained == [
            list(range(4 * step, 4 * step + 4)) for step in range(done, 3)]
        assert steps(folder) == made


def test_a_resumed_run_that_had_reached_its_level_has_nothing_left_to_do(tmp_path):
    """It was ended before its model was saved."""
    given = {"driver.num_steps": 20, "eval.every": 2, "eval.stop_at": 0.8}
    RunFolder(tmp_path).append(EVAL, {"step": 4, "eval/task_mean": 0.9, "answers": []})
    assert run(tmp_path, lambda uid: [1, 0], done=4, **given).trained == []
    assert len(run(tmp_path, lambda uid: [1, 0], done=4, **{**given, "eval.stop_at": 0.95}).trained) == 16


def test_what_a_run_that_never_began_has_evaluated_is_not_this_ones(tmp_path):
    RunFolder(tmp_path).append(EVAL, {"step": 0, "eval/task_mean": 1.0, "answers": []})
    assert len(run(tmp_path, lambda uid: [1, 0], **{"eval.every": 2, "eval.stop_at": 0.8}).trained) == 3
    assert [line["eval/task_mean"] for line in read_lines(tmp_path / EVAL)] == [1.0, 0.5, 0.5, 0.5]


def noting(done: list[int]):
    return as_callback(lambda step, metrics: done.append(step))


@pytest.mark.parametrize("num_engines", [1, 3])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_each_engine_is_probed_before_the_first_step_and_after_each_of_an_asynchronous_run(
        tmp_path, max_staleness, num_engines):
    parts = run(tmp_path, differs_but_every_third, **{"driver.max_staleness": max_staleness,
                                                      "rollout.num_engines": num_engines})
    first, *later = parts.probed
    assert set(first) == set(range(num_engines)) and len(first) >= 4 * num_engines, "at several lengths each"
    assert later == ([list(range(num_engines))] * 3 if max_staleness else [])
    gaps = [line.get("weights/logprob_gap_max") for line in read_lines(tmp_path / METRICS)]
    assert gaps == ([0.0] * 3 if max_staleness else [None] * 3)


def test_a_run_whose_engine_and_trainer_disagree_ends_before_it_trains(tmp_path):
    def gap_of(engine, version, position):
        return 0.25 if engine == 1 and position >= 40 else 0.0

    with pytest.raises(BaseException) as told:  # of several tasks
        run(tmp_path / "stops", lambda uid: [1, 0], gap_of=gap_of, **{"rollout.num_engines": 2})
    error = first_cause(told.value)
    assert isinstance(error, UserError) and str(error).startswith("engine 1 and the trainer")
    assert "-1.0000 from the engine, -0.7500 from the trainer" in str(error)
    assert not (tmp_path / "stops" / METRICS).exists()
    log = io.StringIO()
    parts = run(tmp_path / "goes on", lambda uid: [1, 0], gap_of=gap_of, terminal=log,
                **{"rollout.num_engines": 2, "weights.allow_logprob_gap": True})
    assert len(parts.trained) == 3 and "warning: engine 1 and the trainer" in log.getvalue()


def test_a_gap_that_comes_later_is_told_at_every_step_and_the_run_goes_on(tmp_path):
    log = io.StringIO()
    parts = run(tmp_path, lambda uid: [1, 0], gap_of=lambda engine, version, position: 0.25 * (version > 0),
                terminal=log, seconds_of=lambda prompt: 0.4, **{"driver.max_staleness": 1})
    assert len(parts.trained) == 3
    assert [line["weights/logprob_gap_max"] for line in read_lines(tmp_path / METRICS)] == [0.25] * 3
    assert "step 1: weights/logprob_gap_mean is 2.5e-01" in log.getvalue()
    assert log.getvalue().count("weights/logprob_gap_mean is") == 1   # an episode is told once


def test_the_first_weights_are_published_too_and_a_resumed_run_publishes_above_all_of_before(tmp_path):
    assert run(tmp_path / "new", lambda uid: [1, 0]).published == [(0, 0), (1, 1), (2, 2), (3, 3)]
    resumed = run(tmp_path / "resumed", lambda uid: [1, 0], done=1, version=7)
    assert resumed.published == [(8, 1), (9, 2), (10, 3)]
    lines = read_lines(tmp_path / "resumed" / METRICS)
    assert [line["driver/version"] for line in lines] == [9, 10]
    assert all(line["driver/staleness_max"] == 0 for line in lines), "it is counted in steps"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_checkpoint_says_where_the_loop_stands(tmp_path, max_staleness):
    """A resumed run starts again what was in flight."""
    parts = run(tmp_path, differs_but_every_third, done=1, version=7, **{
        "filter.reward": "task", "driver.num_steps": 4, "driver.max_staleness": max_staleness, "checkpoint.every": 1,
        "checkpoint.keep": 9})
    folders = whole(RunFolder(tmp_path).checkpoints)
    assert parts.saved == [str(folder.with_name(f".{folder.name}.writing") / "trainer") for folder in folders]
    assert len(folders) == 3
    drawn = []
    for folder, step in zip(folders, (2, 3, 4), strict=True):
        state, trained = load(folder), {uid for batch in parts.trained[: step - 1] for uid in batch}
        assert (state.step, state.version) == (step, 7 + step)
        assert not trained & set(state.unfinished) and all(uid < state.next_uid for uid in state.unfinished)
        gone = {*range(4, state.next_uid)} - trained - set(state.unfinished)
        assert all(uid % 3 == 0 for uid in gone) and state.prompts_dropped == len(gone)
        drawn.append(state.next_uid)
    assert drawn == sorted(drawn)


def test_each_steps_first_groups_are_written_down(tmp_path):
    parts = run(tmp_path, differs_but_every_third, **{"observability.samples_per_step": 2})
    lines = read_lines(tmp_path / SAMPLES)
    assert [line["step"] for line in lines] == [0, 0, 1, 1, 2, 2]
    shown = [uid for batch in parts.trained for uid in batch[:2]]
    assert [line["reward"] for line in lines] == [differs_but_every_third(uid)[0] for uid in shown]
    assert all(line["completion"] == "text" and line["prompt"].endswith("+1=") for line in lines)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_rollout_worker_that_dies_changes_no_synchronous_batch_and_no_sample(tmp_path, num_workers):
    """Its groups start again, with the same seeds."""
    given = {"filter.reward": "task", "rollout.split_groups": 2}
    whole_run = run(tmp_path / "plain", differs_but_every_third, **given)
    died = run(tmp_path / "died", differs_but_every_third, deadly=[1, 4, 13], **given,
               **{"rollout.num_workers": num_workers})
    assert not died.deadly and len(died.rolled) > len(whole_run.rolled)
    assert (died.trained, died.sampled) == (whole_run.trained, whole_run.sampled)
    assert [line["filter/acceptance_rate"] for line in read_lines(tmp_path / "died" / METRICS)] == [
        line["filter/acceptance_rate"] for line in read_lines(tmp_path / "plain" / METRICS)]


@pytest.mark.parametrize("oversample", [0, 1.0])
def test_groups_that_are_lost_before_ranks_hold_them_start_again_and_change_no_batch(tmp_path, oversample):
    """Of a batch whose arrays can't all be had, nothing is trained on."""
    given = {"filter.reward": "task", "filter.oversample": oversample, "rollout.num_workers": 3}
    plain = run(tmp_path / "plain", differs_but_every_third, **given)
    parts = run(tmp_path / "lost", differs_but_every_third, lost=[2, 4, 11], **given)
    assert not parts.lost and (parts.trained, parts.sampled) == (plain.trained, plain.sampled)
    assert all(parts.rolled.count(uid) >= 2 for uid in (2, 4, 11))


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_an_asynchronous_run_outlives_its_rollout_workers_within_the_bound(tmp_path, max_staleness):
    parts = run(tmp_path, lambda uid: [1, 0], deadly=[3, 9], lost=[1, 10, 17], **{
        "driver.max_staleness": max_staleness, "driver.num_steps": 5, "rollout.num_workers": 2})
    assert not parts.deadly and not parts.lost
    assert sorted(uid for batch in parts.trained for uid in batch) == [*range(20)]
    assert all(line["driver/staleness_max"] <= max_staleness for line in read_lines(tmp_path / METRICS))


def test_an_evaluation_outlives_a_rollout_worker(tmp_path):
    run(tmp_path, lambda uid: [1, 0], deadly=[2, 8], **{"eval.every": 1})
    lines = read_lines(tmp_path / EVAL)
    assert [(line["step"], line["eval/prompts"], line["eval/failed"]) for line in lines] == [
        (step, 9, 0) for step in range(4)]
