"""benchmarks.gpu without an engine: which section gets how much time, what the report says, how figures are made."""

from __future__ import annotations

import dataclasses
import doctest
import json

import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_work
from benchmarks.gpu import Outcome, Section, allotted_s, chosen, run_all, run_section, sections, summary, write_to
from benchmarks.gpu_parts import keep, loop_figures
from benchmarks.gpu_work import HALF_BILLION, TINY, made_groups, make_rows, step_flops
from benchmarks.parts import PARTS
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("module", [gpu_parts, gpu_work], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("device, tiny", [("cuda", False), ("cuda", True), ("cpu", True)])
def test_each_section_has_its_part_and_comes_after_what_it_needs(device, tiny):
    seen = set()
    for section in sections(device=device, tiny=tiny):
        assert section.part in PARTS and set(section.needs) <= seen, section
        json.dumps(section.asked)
        seen.add(section.name)
    assert ("publish_ipc" in seen) == (device == "cuda"), "two processes share memory of a GPU only"


def test_nine_minutes_are_enough_for_every_section_to_begin():
    """Where each takes all that it is given."""
    planned, left_s = sections(device="cuda", tiny=False), 9 * 60.0
    for at, section in enumerate(planned):
        given_s = allotted_s(planned, at, left_s)
        assert given_s > section.least_s, section
        left_s -= given_s
    assert left_s == pytest.approx(0)


def test_only_takes_what_a_section_needs_along():
    every = sections(device="cuda", tiny=False)
    assert [section.name for section in chosen(every, "lora")] == ["machine", "model", "lora"]
    assert chosen(every, None) == every
    with pytest.raises(UserError, match="unknown --only 'lroa': did you mean 'lora'"):
        chosen(every, "lroa")


class Time:
    """A clock that sections move on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ran(planned, takes_s, *, minutes=1.0, outcomes=None):
    """The report of sections that take so long, and each report as it was written."""
    time, report, written, given = Time(), {}, [], {}

    def run(section, deadline_s):
        given[section.name] = deadline_s
        time.now_s += min(takes_s.get(section.name, 0.0), deadline_s)
        return (outcomes or {}).get(section.name, Outcome("done", figures={"a": 1.0}))

    run_all(report, planned, ends_s=100.0 + 60 * minutes, run=run, now_s=time,
            write=lambda report: written.append(json.loads(json.dumps(report))))
    return report["sections"], written, given


FOUR = [Section("model", "", "", share=1, least_s=1), *(
    Section(name, "", "", share=share, least_s=5, needs=("model",)) for name, share in (("a", 2), ("b", 2), ("c", 1)))]


def test_time_that_a_section_has_no_need_of_is_passed_on():
    _, _, given = ran(FOUR, {"model": 0.0, "a": 10.0, "b": 1000.0})
    assert given == {"model": 10.0, "a": 60 * 2 / 5, "b": 50 * 2 / 3, "c": pytest.approx(50 / 3)}


def test_a_section_without_time_or_without_its_model_is_skipped_and_says_why():
    entries, _, given = ran(FOUR, {}, minutes=0.2)
    assert list(given) == ["model", "b", "c"], "what a had no use for is theirs"
    assert entries["a"]["reason"] == "its share of the time is 5 s, and it needs 5"
    assert [entries[name]["state"] for name in "abc"] == ["skipped", "done", "done"]
    entries, _, given = ran(FOUR, {}, outcomes={"model": Outcome("failed", "no space left", output=["…"])})
    assert list(given) == ["model"]
    assert (entries["model"]["reason"], entries["model"]["output"]) == ("no space left", ["…"])
    assert {entries[name]["reason"] for name in "abc"} == {"it needs model, which is not there"}


def test_what_fails_is_told_and_the_rest_goes_on_and_each_state_is_written():
    broken = Outcome("cut", "gpu_loop took longer than 12 s", figures={"step_s": 3.0}, peak_gpu_mib=70_000)
    entries, written, given = ran(FOUR, {}, outcomes={"a": broken})
    assert list(given) == ["model", "a", "b", "c"]
    assert entries["a"]["state"] == "cut" and entries["a"]["figures"] == {"step_s": 3.0}
    assert entries["a"]["peak_gpu_mib"] == 70_000 and entries["c"]["state"] == "done"
    states = [[entry["state"] for entry in report["sections"].values()] for report in written]
    assert states[0] == ["waiting"] * 4
    assert states[3] == ["done", "interrupted", "waiting", "waiting"], "what an interruption would leave"
    assert states[-1] == ["done", "cut", "done", "done"]


def test_the_summary_is_of_what_there_is():
    loop = {"step_s": 8.0, "tokens_per_s": 1000.0, "generation_share": 0.75, "train_tflops": 200.0}
    entries = {
        "machine": {"figures": {"product_tflops": 800.0}}, "synchronous": {"figures": loop},
        "asynchronous": {"figures": loop | {"step_s": 5.0}}, "head": {"state": "skipped"},
        "packed_rows": {"figures": {"tokens": 9, "varlen": {"step_s": 1.0, "train_tflops": 240.0},
                                    "padded": {"step_s": 4.0, "train_tflops": 60.0},
                                    "transformers_alone": {"error": "x"}}},
        "lora": {"figures": {"rank_16": {"step_s": 0.9, "peak_gib": 10.0},
                             "all_weights": {"step_s": 1.0, "peak_gib": 40.0}}},
        "publish_ipc": {"figures": {"gb_per_s": 4.0, "served_s": 0.2, "stalled_s": 0.1}}}
    found = summary(entries)
    assert found["asynchronous_gain"] == 8 / 5 and found["packed_gain"] == 4.0
    assert found["lora_peak_gib_of_all_weights"] == 0.25 and found["lora_step_s_of_all_weights"] == 0.9
    assert (found["synchronous_mfu"], found["varlen_mfu"], found["padded_mfu"]) == (0.25, 0.3, 0.075)
    assert found["publish_ipc_served_s"] == 0.2 and "of_transformers_alone" not in found
    assert summary({"machine": {"state": "waiting"}}) == {}


def test_a_loop_s_figures_are_medians_of_its_measured_steps():
    steps = [{"driver/step_s": s, "driver/wait_s": s - 1, "train/step_s": 0.5, "weights/publish_s": 0.25,
              "rollout/tokens_per_s": 100 * s, "driver/staleness_max": i, "weights/logprob_gap_mean": 0.01 * i}
             for i, s in enumerate((2.0, 4.0, 3.0))]
    figures = loop_figures(steps, TINY, model_bytes=10**9)
    tokens = sum(TINY.lengths) + len(TINY.lengths) * TINY.prompt_tokens
    assert figures["steps"] == 3 and figures["step_s"] == 3.0 and figures["generation_share"] == 2 / 3
    assert figures["tokens_a_step"] == tokens and figures["tokens_per_s"] == tokens / 3
    assert figures["sampled_tokens_per_s"] == sum(TINY.lengths) / 3 and figures["publish_gb_per_s"] == 4.0
    assert figures["staleness_max"] == 2 and figures["logprob_gap_mean"] == 0.02
    assert loop_figures([], TINY, model_bytes=1) == {}


def test_flops_of_a_step_by_hand():
    """One layer, one token: its attention's and its MLP's weights, the head's, and attention to itself."""
    size = dataclasses.replace(TINY, vocab=100, hidden=8, intermediate=16, layers=1, heads=2, kv_heads=1)
    weights = (8 * 8 + 8 * 8 + 2 * 8 * 4) + 3 * 8 * 16 + 8 * 100
    assert step_flops(size, [1]) == 6 * weights + 6 * 8
    assert step_flops(size, [3, 2]) == 6 * weights * 5 + 6 * 8 * (9 + 4)


def test_rows_and_groups_have_the_lengths(tmp_path):
    make_rows(tmp_path / "rows.jsonl", TINY, steps=2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * TINY.prompts and len({row["prompt"] for row in rows}) == len(rows)
    assert {len(row["prompt"]) for row in rows} == {TINY.prompt_tokens}
    assert [n for row in rows[TINY.prompts :] for n in row["lengths"]] == TINY.lengths
    groups, scores = made_groups(TINY, TINY.lengths)
    assert [t.num_loss_tokens for group in groups for t in group.trajectories] == TINY.lengths
    assert [score.uid for score in scores] == [group.prompt.uid for group in groups]
    assert HALF_BILLION.prompts == 32


def test_what_a_section_had_when_it_broke_is_kept(tmp_path, monkeypatch):
    asked = {"device": "cpu"}

    def part(name, folder, *, deadline_s, work, env, **given):
        assert (name, given, env) == ("gpu_loop", asked, None)
        keep(work, {"config": {"x": 1}, "figures": {"step_s": 2.0}})
        (work / "output.txt").write_text("one\ntwo\n")
        raise RuntimeError("gpu_loop took longer than 3 s")

    monkeypatch.setattr(gpu, "run_part", part)
    section = Section("synchronous", "", "gpu_loop", share=1, least_s=1, asked=asked)
    outcome = run_section(section, 3.0, folder=tmp_path, device="cpu")
    assert (outcome.state, outcome.reason) == ("cut", "gpu_loop took longer than 3 s")
    assert outcome.figures == {"step_s": 2.0} and outcome.config == {"x": 1} and outcome.output == ["one", "two"]


def test_a_report_is_json_of_four_digits(tmp_path):
    write_to(tmp_path / "it.json")({"a": 1.23456, "b": [{"c": 123456.7}], "d": True, "e": 12345})
    assert json.loads((tmp_path / "it.json").read_text()) == {"a": 1.235, "b": [{"c": 123500.0}], "d": True, "e": 12345}
    assert [file.name for file in tmp_path.iterdir()] == ["it.json"]


@pytest.mark.parametrize("words, said", [
    ([], "no GPU here"), (["--device", "cpu"], "--device cpu needs --tiny"),
    (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0: more than 0"),
    (["--only", "x"], "unknown --only 'x'"),
])
def test_refused_in_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1
