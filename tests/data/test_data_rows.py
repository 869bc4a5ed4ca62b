import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_ray.data.sources import load_rows
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "línea\n2", "answer": "007"}, {"prompt": "x", "answer": "3"}]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(path):
    path.write_text(json.dumps(ROWS))


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def load(source, max_rows=None):
    return load_rows(source, split="train", max_rows=max_rows)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, ending, packed):
    path = tmp_path / f"rows{ending}"
    WRITERS[ending](path)
    if packed:
        path = tmp_path / f"rows{ending}.gz"
        path.write_bytes(gzip.compress((tmp_path / f"rows{ending}").read_bytes()))
    assert list(load(str(path)).rows) == ROWS
    assert list(load(path, max_rows=2).rows) == ROWS[:2]
    assert load(path).columns == ("prompt", "answer")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, ["no such file"]),
        ("rows.jsonl", "", ["no rows"]),
        ("rows.json", "", ["no rows"]),
        ("rows.json", "[]", ["no rows"]),
        ("rows.csv", "", ["no rows"]),
        ("rows.csv", "prompt,answer\n", ["no rows"]),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["line 2", "broken JSON"]),
        ("rows.jsonl", '{"prompt": "a"}\n[1]\n', ["line 2", "list"]),
        ("rows.json", '{"prompt": "a"}', ["dict", "JSON list"]),
        ("rows.json", '[{"prompt": "a"}, 3]', ["row 2", "int"]),
        ("rows.json", "[{]", ["line 1", "broken JSON"]),
        ("rows.csv", "prompt,answer\na,1\nb\n", ["row 2", "1 cells", "header has 2"]),
        ("rows.csv", 'prompt,answer\n"a,1\n', ["broken CSV"]),
        ("rows.parquet", "not parquet", ["broken Parquet"]),
        ("rows.jsonl.gz", "not gzip", ["cannot be read"]),
        ("rows.doc", "a", ["unknown kind of file", ".parquet"]),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_its_place(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert "\n" not in str(error.value)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(path))


def test_a_folder_and_a_hub_name_that_cannot_be_had_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no data file in this folder"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="neither a file here nor a data set") as error:
        load("no such name!")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"s3://bucket/a\.jsonl: addresses aren't read: fetch it first"):
        load("s3://bucket/a.jsonl")


def test_a_data_set_with_subsets_names_them(monkeypatch):
    import datasets

    def asks(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"
                         "Example of usage:\n\t`load_dataset('a/b', 'main')`")

    monkeypatch.setattr(datasets, "load_dataset", asks)
    with pytest.raises(UserError, match=r"name one as a/b:SUBSET: \['main', 'socratic'\]") as error:
        load("a/b")
    assert "\n" not in str(error.value)


def test_rows_with_other_keys_get_none_for_what_they_lack(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "answer": "1"}\n')
    assert list(load(path).rows) == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "1"}]


def test_a_missing_column_names_those_there_and_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown column 'promt': did you mean 'prompt'\? \(known: answer, prompt\)"):
        load(ROWS).require("promt", "data.prompt_column")


def test_rows_in_memory_are_texts_or_dicts():
    rows = list(load(["a", {"prompt": "b", "answer": "1"}]).rows)
    assert rows == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "1"}]
    with pytest.raises(UserError, match=r"item 2 .* is int"):
        load(["a", 3])


@pytest.mark.parametrize(("name", "content"), [
    ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n[1]\n{"prompt": "b"}\n'),
    ("rows.csv", "prompt,answer\na,1\nb\nc,1,2\nb,2\n"),
])
def test_broken_lines_are_skipped_and_counted_where_the_user_says_so(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows = load_rows(tmp_path / name, split="train", max_rows=None, on_bad_row="skip")
    assert [row["prompt"] for row in rows.rows] == ["a", "b"] and rows.num_broken == 2
