"""What a data set's name stands for: files, folders, globs, what the datasets library wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from flux_ray.data.sources import load_rows
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]


def load(source, split="train", **options):
    return load_rows(source, split=split, max_rows=None, **options)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parts(tmp_path):
    write(tmp_path / "d" / "part-0.jsonl", ROWS[:2])
    write(tmp_path / "d" / "deep" / "part-1.jsonl", ROWS[2:4])
    write(tmp_path / "d" / ".hidden" / "part-2.jsonl", ROWS[4:])
    return tmp_path / "d"


def test_a_folder_is_all_its_files_in_the_order_of_their_names(parts):
    assert list(load(str(parts)).rows) == [*ROWS[2:4], *ROWS[:2]]


def test_a_glob_is_the_files_that_match(parts):
    assert list(load(f"{parts}/*.jsonl").rows) == ROWS[:2]
    assert list(load(f"{parts}/**/*.jsonl").rows) == [*ROWS[2:4], *ROWS[:2]]
    with pytest.raises(UserError, match="no file matches"):
        load(f"{parts}/*.csv")


def test_a_list_of_paths_is_read_one_after_another(parts):
    rows = load([parts / "part-0.jsonl", parts / "deep" / "part-1.jsonl"])
    assert list(rows.rows) == ROWS[:4] and rows.source == f"{parts / 'part-0.jsonl'} and 1 more"
    assert [rows.where(row) for row in (1, 2)] == [
        f"{parts / 'part-0.jsonl'} row 2 (from 1)", f"{parts / 'deep' / 'part-1.jsonl'} row 1 (from 1)"]
    assert len(load_rows([parts / "part-0.jsonl", parts / "deep"], split="train", max_rows=3).rows) == 3


def test_the_files_of_a_split_are_told_apart_by_their_names(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:2])
    write(tmp_path / "data" / "test" / "part.jsonl", ROWS[2:3])
    assert list(load(str(tmp_path)).rows) == ROWS[:2]
    assert list(load(str(tmp_path), "test").rows) == ROWS[2:3]
    with pytest.raises(UserError, match=r"no file of split 'validation' in it"):
        load(str(tmp_path), "validation")


def test_a_folder_of_several_formats_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("prompt\na\n")
    with pytest.raises(UserError, match=r"of several kinds \(\.csv, \.jsonl\): name those that are meant"):
        load(str(tmp_path))


def test_what_the_datasets_library_saved(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert list(load(str(tmp_path / "one")).rows) == ROWS
    both = DatasetDict(train=Dataset.from_list(ROWS[:4]), test=Dataset.from_list(ROWS[4:]))
    both.save_to_disk(str(tmp_path / "both"))
    assert list(load(str(tmp_path / "both")).rows) == ROWS[:4]
    assert list(load(str(tmp_path / "both"), "test").rows) == ROWS[4:]
    with pytest.raises(UserError, match=r"no split 'dev' in it: it has test, train"):
        load(str(tmp_path / "both"), "dev")


def test_arrow_streams_and_files(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert list(load(str(tmp_path / f"{name}.arrow")).rows) == ROWS
    (tmp_path / "broken.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="broken Arrow"):
        load(str(tmp_path / "broken.arrow"))


def test_tab_separated_and_plain_text(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tanswer\n1, 2\t007\n")
    assert list(load(str(tmp_path / "a.tsv")).rows) == [{"prompt": "1, 2", "answer": "007"}]
    (tmp_path / "a.txt").write_text("first\r\n\nthird \u2028 line\n")
    rows = load(str(tmp_path / "a.txt"), column="text")
    assert list(rows.rows) == [{"text": "first"}, {"text": "third \u2028 line"}] and rows.numbers.tolist() == [1, 3]


def test_one_object_a_line_under_the_name_json(tmp_path):
    assert list(load(str(write(tmp_path / "a.json", ROWS))).rows) == ROWS
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    with pytest.raises(UserError, match=r"dict, whose rows may lie under 'data', not a JSON list"):
        load(str(tmp_path / "b.json"))


def test_a_header_with_one_name_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,prompt\na,1,b\n")
    with pytest.raises(UserError, match="the header names 'prompt' twice"):
        load(str(tmp_path / "a.csv"))


def test_a_broken_line_of_several_files_names_its_own(parts):
    (parts / "part-9.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(UserError, match=r"part-9\.jsonl line 2: broken JSON"):
        load(str(parts))
    assert load(str(parts), on_bad_row="skip").num_broken == 1


def test_shards_with_other_columns_and_an_empty_one(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    write(tmp_path / "b.jsonl", [])
    write(tmp_path / "c.jsonl", [{"prompt": "c", "answer": "1"}])
    assert list(load(str(tmp_path)).rows) == [{"prompt": "a", "answer": None}, {"prompt": "c", "answer": "1"}]
