"""The benchmark's pure parts: medians, goals, the table, which figures are chosen, the lengths."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks import data_start, recorder_cost
from benchmarks.bench import main
from benchmarks.driver_cost import count_bytes
from benchmarks.figures import FIGURES, Failed, Measured, as_json, chosen, meets, quartiles, table
from benchmarks.publish import first_token_s, waits_s
from benchmarks.session import EQUAL, UNEQUAL, Session
from benchmarks.work import NUM_SEQUENCES, Phase, equal, log_normal, make_data, micro_batches
from flux_ray import Monitor, register_monitor
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


def test_medians_and_quartiles():
    figure = Measured.of("x", [4.0, 1.0, 3.0, 2.0, 5.0], unit="s", goal="<= 3", engines=2)
    assert (figure.value, figure.quartiles, figure.runs) == (3.0, (2.0, 4.0), 5)
    assert figure.met is True and figure.about == {"engines": 2}
    assert quartiles([7.0]) == (7.0, 7.0)
    assert Measured.of("x", [1.0], unit="s").met is None, "without a goal there is nothing to meet"


@pytest.mark.parametrize(("value", "goal", "met"), [
    (1.08, "<= 1.08", True), (1.081, "<= 1.08", False), (1.8, ">= 1.8", True), (1.79, ">= 1.8", False),
])
def test_goals(value, goal, met):
    assert meets(value, goal) is met


def test_a_line_of_json_holds_what_is_asked_for():
    line = json.loads(as_json(Measured.of("vs_trl", [2.0, 2.1, 2.3], unit="x", goal=">= 2.0", threads=2)))
    assert line == {"name": "vs_trl", "value": 2.1, "unit": "x", "goal": ">= 2.0", "met": True, "runs": 3, "iqr": 0.15,
                    "quartiles": [2.05, 2.2], "threads": 2}
    assert json.loads(as_json(Failed("vs_trl", "no trl"))) == {
        "name": "vs_trl", "value": None, "unit": None, "goal": None, "runs": 0, "error": "no trl"}


def test_the_table_tells_what_was_met_and_what_failed():
    shown = table([Measured.of("driver_10", [0.9], unit="ms", goal="<= 1.0"),
                   Measured.of("padding", [7.25], unit="%", goal="<= 5"), Failed("vs_trl", "trl ended with 1")])
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["figure", "value", "quartiles", "unit", "goal", "met", "runs"]
    assert lines[1] == ["driver_10", "0.9", "0.9", "..", "0.9", "ms", "<=", "1.0", "yes", "1"]
    assert lines[2][-2:] == ["NO", "1"] and lines[3] == ["vs_trl", "failed", "trl", "ended", "with", "1"]


def test_only_names_figures():
    assert [figure.name for figure in chosen(None)] == list(FIGURES)
    assert [figure.name for figure in chosen("memory, sync_ratio")] == ["sync_ratio", "memory"]
    with pytest.raises(UserError, match="unknown --only 'drivr': did you mean 'driver'"):
        chosen("memory,drivr")


def test_each_figure_has_its_function():
    for figure in FIGURES.values():
        module, _, function = figure.measure.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))


def test_a_session_may_have_one_kind_of_lengths(tmp_path):
    session = Session(tmp_path, "bfloat16", tokens=8, runs=4)
    assert [(phase["name"], phase["warm_up"], phase["runs"]) for phase in session.phases(warm_up=3)] == [
        (EQUAL, 3, 4), (UNEQUAL, 3, 4)]
    short = Session.short(tmp_path, "bfloat16")
    assert [phase["warm_up"] for phase in short.phases()] == [1, 0]
    session.lengths = (UNEQUAL,)
    assert [phase["name"] for phase in session.phases()] == [UNEQUAL]
    assert session.phases()[0]["lengths"] == log_normal(8)


def test_bare_parts_are_measured_before_and_after_each_run_of_ours(tmp_path, monkeypatch):
    ran = []

    def part(name, folder, *, deadline_s, env=None, **asked):
        ran.append(name)
        return {EQUAL: [float(len(ran))], UNEQUAL: [float(len(ran))]}

    monkeypatch.setattr("benchmarks.session.run_part", part)
    session = Session(tmp_path, "float32", runs=2)
    assert session.of_ratios().floors("synchronous")[EQUAL] == ((1 + 4) / 2, (2 + 5) / 2)
    assert session.of_ratios().floors("asynchronous")[EQUAL] == ((4 + 7) / 2, (5 + 8) / 2)
    assert session.of_ratios().floors("synchronous")[EQUAL] == ((1 + 4) / 2, (2 + 5) / 2)
    assert ran == ["vllm", "deepspeed", "ours", "vllm", "deepspeed", "ours", "vllm", "deepspeed"]


@pytest.mark.parametrize(("arguments", "said"), [
    (("--lengths", "long"), "invalid choice: 'long'"), (("--trl", "2"), "expected 2 arguments"),
    (("--trl", "2", "0"), "--trl [2, 0]: at least 1"), (("--runs", "0"), "--runs 0: at least 1"),
])
def test_wrong_options_are_told_before_anything_starts(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_log_normal_lengths_are_the_same_work(tmp_path):
    lengths = log_normal(256)
    assert len(lengths) == NUM_SEQUENCES and sum(lengths) == sum(equal(256)) and lengths == log_normal(256)
    assert max(lengths) > 4 * 256 and min(lengths) < 64
    assert sorted(n for rows in micro_batches(lengths) for n in rows) == sorted(16 + length for length in lengths)
    phase = Phase("made", lengths, warm_up=1, runs=2)
    make_data(tmp_path / "data.jsonl", [phase])
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [n for row in rows[8:16] for n in row["lengths"]] == lengths, "the second step's"


def test_when_a_version_is_served_and_how_long_a_request_waited_for_it():
    requests = [{"times_s": [1.0, 1.1, 1.5, 1.6], "versions": [3, 3, 4, 4]},
                {"times_s": [1.4, 1.7], "versions": [4, 4]}]
    assert first_token_s(requests, 4) == 1.5, "the second request had no weights to wait for"
    assert first_token_s(requests, 5) is None and first_token_s(requests[1:], 4) is None
    assert waits_s(requests, 4) == [pytest.approx(0.4)] and waits_s(requests, 3) == []


def test_bytes_of_a_process_s_sockets():
    shown = """ESTAB 0 0 127.0.0.1:40000 127.0.0.1:6379 users:(("python",pid=12,fd=9))
\t cubic rto:204 bytes_sent:1000 bytes_retrans:7 bytes_acked:1001 bytes_received:500 segs_out:1
ESTAB 0 0 127.0.0.1:40001 127.0.0.1:6380 users:(("raylet",pid=123,fd=9))
\t cubic rto:204 bytes_sent:4000 bytes_received:4000
"""
    assert count_bytes(shown, pid=12) == 1500


def test_what_data_cost_at_a_start(tmp_path, monkeypatch, capsys):
    source = tmp_path / "problems.jsonl"
    source.write_text(json.dumps({"question": "How many are 3 and 4?", "answer": "They are #### 7"}) + "\n")
    monkeypatch.setattr("sys.argv", ["data_start", "--rows", "30", str(source)])
    data_start.main()
    measured = json.loads(capsys.readouterr().out)
    assert measured["rows"] == 30 and measured["tokens_mean"] > 5 and measured["bytes_per_row"] >= 0


def test_what_a_recorder_costs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recorder_cost", "--steps", "1", "--monitors", "jsonl_of_a_test"])
    monkeypatch.setattr(recorder_cost, "STEP_S", 0.0)
    register_monitor("jsonl_of_a_test")(Monitor)
    recorder_cost.main()
    measured = json.loads(capsys.readouterr().out)
    assert measured["metrics"] == 90 and min(measured[name] for name in ("files_ms", "live_ms", "all_ms")) > 0
