"""What the page of runs is given, what a report and a comparison say: of whole runs, half-written ones, and none."""

from __future__ import annotations

import json
import re
import socket

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flux_ray import __main__ as cli
from flux_ray import run_dir
from flux_ray.errors import UserError
from flux_ray.observability.page import html
from flux_ray.observability.page.figures import cost, first_of_tail, series, tail_mean
from flux_ray.observability.page.report import ENVIRONMENT, REPORT, at_end, report
from flux_ray.observability.page.runs import Run, differences, found_runs
from flux_ray.observability.page.table import Wanted, table_of
from flux_ray.observability.page.timeline import timeline
from flux_ray.observability.page.tokens import Texts
from flux_ray.observability.page.view import PORT, _listen
from tests.fakes.run_files import write_lines, write_metrics, write_rollouts, write_run

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(write_run(tmp_path / "one"), "one")


def rows(table, wanted: Wanted, first: int = 0, size: int = 100) -> list[dict]:
    return table.page(wanted, first=first, size=size)["rows"]


# ---- folders

def test_two_runs_of_one_name_are_told_apart(tmp_path):
    write_run(tmp_path / "a" / "grpo")
    write_run(tmp_path / "b" / "grpo")
    runs, wrong = found_runs([tmp_path / "a" / "grpo", tmp_path / "b" / "grpo", tmp_path / "a" / "grpo"])
    assert [run.name for run in runs] == ["a/grpo", "b/grpo"] and wrong == []


def test_a_folder_that_is_no_run_names_those_below_it(tmp_path):
    write_run(tmp_path / "grpo")
    with pytest.raises(UserError, match=rf"is no run's folder; these below it are: {tmp_path}/grpo$"):
        found_runs([tmp_path])
    runs, wrong = found_runs([tmp_path / "none", tmp_path / "grpo"])
    assert [run.name for run in runs] == ["grpo"] and wrong == [f"there is no folder {tmp_path / 'none'}"]


def test_a_config_of_another_program_makes_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("colour: blue\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is no run's folder: it has none of config\.yaml, metrics\.jsonl"):
        found_runs([tmp_path])


def test_how_a_run_stands(run):
    assert run.state == "has ended"   # an older version, without accounts
    write_lines(run.path / "ledger.jsonl", [{"step": 0}])
    assert run.state == "was killed"
    with run_dir.held(str(run.path)):
        assert run.state == "goes on"
    write_lines(run.path / "ledger.jsonl", [{"step": -1, "ended": "failed"}])
    assert run.state == "failed"


def test_what_is_missing_or_broken_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n[1]\n{"step": 1}\n{"step": 2', encoding="utf-8")
    run = Run(tmp_path, "broken")
    assert [record["step"] for record in run.lines("metrics.jsonl").records] == [0, 1]
    assert run.notes() == [
        "metrics.jsonl: 2 lines hold no JSON object and are left out",
        "no evaluations: eval.jsonl is not there",
        "no rollouts: rollouts/ is not there; nor is samples.jsonl",
        "no config: config.yaml is not there"]


def test_a_file_that_grows_is_read_on_and_one_written_anew_from_its_start(tmp_path):
    run, file = Run(tmp_path, "grows"), tmp_path / "metrics.jsonl"
    write_metrics(tmp_path, 2)
    first = run.lines("metrics.jsonl")
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2')
    assert run.lines("metrics.jsonl", first.cursor).records == []
    with file.open("a", encoding="utf-8") as stream:
        stream.write('}\n')
    second = run.lines("metrics.jsonl", first.cursor)
    assert (second.records, second.anew) == ([{"step": 2}], False)
    (tmp_path / "new").write_text('{"step": 0}\n', encoding="utf-8")
    (tmp_path / "new").replace(file)
    third = run.lines("metrics.jsonl", second.cursor)
    assert (third.records, third.anew) == ([{"step": 0}], True)


def test_options_that_differ():
    assert differences([{"seed": 0, "algo.name": "grpo"}, {"seed": 1, "algo.name": "grpo", "run_dir": "x"}]) == [
        "run_dir", "seed"]


# ---- the table

@pytest.mark.parametrize("wanted, count", [
    (Wanted(), 32), (Wanted(outcome="trained"), 16), (Wanted(outcome="none such"), 0), (Wanted(data_set="sums"), 32),
    (Wanted(first_step=1, last_step=2), 16), (Wanted(least_reward=0.5), 8), (Wanted(most_reward=0.0), 17),
    (Wanted(uid=3), 4), (Wanted(truncated=True), 8),
])
def test_a_filter_leaves_what_fits(run, wanted, count):
    page = table_of(run).page(wanted, first=0, size=3)
    assert (page["total"], page["known"], page["unread"]) == (count, 32, 0)
    assert page["outcomes"] == ["same_reward", "trained"] and page["data_sets"] == ["sums"]


def test_rows_are_sorted_and_paged(run):
    table = table_of(run)
    best = rows(table, Wanted(sort="reward"))
    assert [row["reward"] for row in best] == sorted((row["reward"] for row in best), reverse=True)
    assert rows(table, Wanted(sort="reward"), first=2, size=3) == best[2:5]
    assert rows(table, Wanted(sort="outcome", descending=False))[0]["outcome"] == "same_reward"
    assert [row["step"] for row in rows(table, Wanted())][:9] == [3] * 8 + [2]


def test_a_search_is_in_prompts_and_responses_whatever_the_case(run):
    table = table_of(run)
    every = rows(table, Wanted())
    with_bold = [row for row in every if "<b>bold</b>" in row["response"]]
    assert 0 < len(with_bold) < 32
    assert rows(table, Wanted(search="<B>Bold")) == with_bold
    assert rows(table, Wanted(search="<B>Bold", outcome="trained")) == [
        row for row in with_bold if row["outcome"] == "trained"]
    assert {row["uid"] for row in rows(table, Wanted(search="7+7="))} == {7}
    assert rows(table, Wanted(search="7+7=.*")) == []


def test_new_steps_come_in_and_thinned_ones_go(run):
    table = table_of(run)
    assert table.page(Wanted(search="7+7="), first=0, size=1)["total"] == 4
    write_rollouts(run.path, 4, groups=2, group_size=4, num_tokens=5)
    (run.path / "rollouts" / "step=000000" / "000-0.parquet").unlink()
    page = table.page(Wanted(), first=0, size=1)
    assert (page["known"], page["rows"][0]["step"]) == (32, 4)
    assert table.page(Wanted(search="7+7="), first=0, size=1)["total"] == 4


def test_a_file_that_is_no_parquet_is_passed_over_and_named(run):
    (run.path / "rollouts" / "step=000001" / "001-0.parquet").write_bytes(b"PAR1 and no more")
    (run.path / "rollouts" / "step=000001" / ".002-0.parquet.tmp").write_bytes(b"half")
    page = table_of(run).page(Wanted(), first=0, size=1)
    assert page["known"] == 32
    assert [note.partition(":")[0] for note in page["notes"]] == [
        "rollouts/step=000001/001-0.parquet can't be read"]


def test_a_file_of_other_columns_is_shown_as_far_as_it_goes(run):
    import pyarrow.parquet as pq

    file = run.path / "rollouts" / "step=000003" / "000-0.parquet"
    with pq.ParquetFile(file) as opened:
        old = opened.read(columns=["uid", "attempt", "sample", "response"])
    pq.write_table(old, file)
    row = rows(table_of(run), Wanted())[0]
    assert (row["uid"], row["prompt"]) == (6, "") and "reward" not in row


def test_reading_stops_at_its_budget_and_goes_on_with_the_next_look(tmp_path):
    for step in range(40):   # more than are read at once
        write_rollouts(tmp_path, step, groups=1, group_size=1, num_tokens=1)
    table = table_of(Run(tmp_path, "many"))
    first = table.page(Wanted(), first=0, size=1, budget_s=0.0)
    assert (first["known"], first["unread"], first["rows"][0]["step"]) == (32, 8, 39)
    second = table.page(Wanted(), first=0, size=1, budget_s=0.0)
    assert (second["known"], second["unread"]) == (40, 0)


def test_a_group_has_all_of_its_samples(run):
    group = table_of(run).group(1, 2, 0)
    assert [row["sample"] for row in group] == [0, 1, 2, 3]
    assert [round(row["parts"]["exact"], 3) for row in group] == [0.001, 0.251, 0.501, 0.751]
    assert len(group[0]["token_ids"]) == len(group[0]["policy_logprobs"]) == 16
    assert table_of(run).group(1, 99, 0) == []


def test_samples_alone_are_a_table(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [
        {"step": 0, "row": 3, "set": "sums", "prompt": "1+1=", "completion": "Two", "reward": 1.0, "parts": {"e": 1.0}},
        {"step": 1, "row": 4, "prompt": [{"role": "user", "content": "hi"}], "completion": "No", "reward": None}])
    table = table_of(Run(tmp_path, "old"))
    assert [row["response"] for row in rows(table, Wanted(sort="reward"))] == ["Two", "No"]
    assert [row["step"] for row in rows(table, Wanted(search="TWO"))] == [0]
    assert rows(table, Wanted(data_set="sums"))[0]["parts"] == {"e": 1.0}
    assert table.page(Wanted(), first=0, size=1)["notes"] == ["no rollouts are kept; these are from samples.jsonl"]
    assert table.group(0, 1, 0) == []


# ---- tokens and time lines

def test_tokens_have_their_texts_and_a_letter_of_several_stands_once(run):
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (run.path / "model").mkdir()
    tokenizer.save(str(run.path / "model" / "tokenizer.json"))
    ids = tokenizer.encode("a é b").ids
    texts = Texts(run)
    assert texts.of(ids) == ["a", " ", "é", "", " ", "b"] and texts.note == ""
    assert texts.of([9999]) == ["[9999]"]


def test_tokens_without_a_tokenizer_are_numbers(run):
    texts = Texts(run)
    assert texts.of([7, 8]) == ["7 ", "8 "]
    assert texts.note == "tokens are shown by their numbers: tokenizer.json is neither in model/ nor in model.path"


def test_a_time_line_has_a_lane_for_each_thread(run):
    found = timeline(run, 3)
    assert [lane["name"] for lane in found["lanes"]] == ["driver · 1", "engine 0 · 1", "engine 0 · 2"]
    driver = found["lanes"][0]["spans"]
    assert [(span["name"], span["begin_ms"], span["ms"], span["depth"]) for span in driver] == [
        ("step", 0, 4000, 0), ("wait for groups", 0, 1500, 1), ("train", 1500, 2000, 1), ("publish", 3500, 500, 1)]


def test_a_time_line_that_is_not_there_or_broken_is_one_line(run):
    with pytest.raises(UserError, match=r"^step 2 has no time line: there is no traces/step-000002\.json$"):
        timeline(run, 2)
    (run.path / "traces" / "step-000002.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"^traces/step-000002\.json can't be read: "):
        timeline(run, 2)


def test_pairs_of_begin_and_end_are_spans(run):
    found = (("B", "a", 0), ("B", "b", 5), ("E", "b", 7000), ("E", "a", 9000))
    events = [*({"ph": ph, "pid": 1, "tid": 1, "name": name, "ts": ts} for ph, name, ts in found), "no event"]
    (run.path / "traces" / "step-000002.json").write_text(json.dumps(events), encoding="utf-8")
    (lane,) = timeline(run, 2)["lanes"]
    assert [(span["name"], span["ms"], span["depth"]) for span in lane["spans"]] == [("a", 9.0, 0), ("b", 6.995, 1)]


# ---- figures

def test_the_end_of_a_run_is_its_last_tenth():
    assert first_of_tail(99) == 90 and first_of_tail(3) == 3
    assert tail_mean([(float(step), float(step)) for step in range(100)]) == 94.5
    assert series([{"step": 0, "a": 1, "b": None, "c": "x", "d": True}, {"step": 1, "a": 2.5}]) == {
        "a": [(0.0, 1.0), (1.0, 2.5)]}


def test_cost_is_in_time_and_tokens():
    metrics = series([{"step": 0, "driver/step_s": 4.0, "train/step_s": 1.0, "rollout/tokens": 200.0}] * 2)
    assert cost(metrics) == [("steps", "2"), ("time in steps", "8 s (0.00 h)"), ("· training", "2 s, 25 %"),
                             ("tokens sampled", "400, 50 a second of a step")]
    assert cost({}) == [("steps", "0")]


# ---- report and compare

def test_a_report_is_whole_in_itself_and_holds_no_markup_of_a_rollout(run):
    answer = {"prompt": "<script>alert(1)</script>", "completion": "a", "reward": 0.0}
    write_lines(run.path / "eval.jsonl", [{"step": 9, "eval/mean": 1.0, "answers": [answer]},
                                          {"step": 10, "eval/mean": 1.0, "answers": [{**answer, "completion": "b"}]}])
    lines = (run.path / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    (run.path / "eval.jsonl").write_text("\n".join(lines[2:]) + "\n", encoding="utf-8")
    text = report(run, run.state)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == [] and "http" not in text.replace("http-equiv", "")
    assert text.count("<polyline") == 12 and "16 s (0.00 h)" in text and "/nowhere" in text


def test_a_report_is_written_and_what_is_missing_is_told(tmp_path, capsys):
    write_metrics(tmp_path, 3)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(tmp_path / "out.html") and "note: no evaluations: eval.jsonl is not there" in said
    assert "environment.json" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "none" / "out.html")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_run_that_ends_leaves_a_report_and_a_failure_of_it_is_only_told(run):
    said: list[str] = []
    at_end(run.path, "interrupted", say=said.append)
    assert said == [] and "the run was interrupted" in (run.path / REPORT).read_text(encoding="utf-8")
    assert "torch" in json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
    (run.path / REPORT).unlink()
    (run.path / REPORT).mkdir()
    at_end(run.path, "done", say=said.append)
    assert said == [f"warning: no report was written: {run.path / REPORT}: can't be written: Is a directory"]


def test_two_runs_are_compared_where_their_prompts_are_the_same(tmp_path, capsys):
    for name, gain in (("a", 0.9), ("b", 0.6)):
        write_run(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").unlink()
        write_metrics(tmp_path / name, 4, gain=gain)
    (tmp_path / "b" / "config.yaml").write_text("algo: {name: dapo}\n", encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "c.html")]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "algo.name grpo dapo" in said and "reward/mean 0.9 0.6 0.9 0.6 -0.3" in said
    assert "rollouts: mean task reward of a prompt: the last tenth of each run's steps" in said
    assert said[-3].startswith("2 0.189 0.189 0 0 to 0 0 / 2 / 0")
    assert (tmp_path / "c.html").read_text(encoding="utf-8").count("<polyline") == 16


def test_rollouts_of_other_prompts_are_not_compared(tmp_path, capsys):
    for name, prompt in (("a", "1+1="), ("b", "2+2=")):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "samples.jsonl", [{"step": 0, "prompt": prompt, "completion": "", "reward": 1.0}])
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "A has 1 prompts, B 1, and none is in both" in capsys.readouterr().out
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2


def test_a_curve_of_many_points_is_drawn_by_few():
    drawn = html.curve("a<b", [[(float(step), 1.0) for step in range(10_000)]])
    assert drawn.count(",") < 320 and "a&lt;b" in drawn


# ---- the port

def test_a_port_in_use_is_refused_where_it_was_named(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["view", str(run.path), "--port", str(port)]) == 2
    assert re.match(rf"flux-ray: --port {port}: can't be listened on \(.*\); name another one", capsys.readouterr().err)
    assert cli.main(["view", str(run.path), "--port", "70000"]) == 2


def test_another_port_is_taken_where_none_was_named():
    with _listen(None) as first, _listen(None) as second:
        assert {first.getsockname()[0], second.getsockname()[0]} == {"127.0.0.1"}
        assert first.getsockname()[1] != second.getsockname()[1] != PORT
