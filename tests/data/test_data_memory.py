"""Rows that a program holds become the rows of a file, or are refused."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from flux_ray.data.memory import as_named, is_named, write_rows
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
COLUMNS = {"prompt": ["1+1=", "2+2="], "answer": ["2", "4"]}


def written(prompts, tmp_path, split="train"):
    file = tmp_path / "rows.jsonl"
    write_rows(prompts, file, column="prompt", split=split)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("prompts", [
    ROWS, tuple(ROWS), COLUMNS, pd.DataFrame(ROWS), pa.Table.from_pylist(ROWS), Dataset.from_list(ROWS),
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])),
    {"prompt": np.array(COLUMNS["prompt"]), "answer": pa.array(COLUMNS["answer"])},
    {"prompt": pd.Series(COLUMNS["prompt"]), "answer": COLUMNS["answer"]},
    IterableDataset.from_generator(lambda: iter(ROWS)),
], ids=lambda prompts: type(prompts).__name__)
def test_every_table_gives_its_rows(tmp_path, prompts):
    assert not is_named(prompts)
    assert written(prompts, tmp_path) == ROWS


def test_iterators_and_texts(tmp_path):
    assert written(iter(ROWS), tmp_path) == ROWS
    assert written(["a", "é"], tmp_path) == [{"prompt": "a"}, {"prompt": "é"}]
    assert written(pd.Series(["a", "b"]), tmp_path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_of_a_stream_without_an_end_the_first_rows_are_taken(tmp_path):
    stream = IterableDataset.from_generator(lambda: itertools.cycle(ROWS))
    write_rows(stream, tmp_path / "rows.jsonl", column="prompt", split="train", max_rows=3)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [*ROWS, ROWS[0]]


def test_numpy_s_numbers_and_empty_cells(tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b"], "answer": [1.5, np.nan], "level": [1, 2]})
    assert written(frame, tmp_path) == [
        {"prompt": "a", "answer": 1.5, "level": 1}, {"prompt": "b", "answer": None, "level": 2}]
    rows = [{"prompt": "a", "ids": np.arange(3), "n": np.int64(4), "x": np.float32(0.5)}]
    assert written(rows, tmp_path) == [{"prompt": "a", "ids": [0, 1, 2], "n": 4, "x": 0.5}]


def test_dates_and_decimals_are_texts(tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b"], "made": [pd.Timestamp("2026-11-29 01:30"), pd.NaT],
                          "price": [Decimal("1.50"), None]})
    assert written(frame, tmp_path) == [{"prompt": "a", "made": "2026-11-29T01:30:00", "price": "1.50"},
                                        {"prompt": "b", "made": None, "price": None}]


@pytest.mark.parametrize(("prompts", "why"), [
    (DatasetDict(dev=Dataset.from_list(ROWS)), r"DatasetDict of 'dev' without 'train'"),
    ({"prompt": ["a", "b"], "answer": ["1"]}, r"columns of different lengths: prompt: 2, answer: 1"),
    ({"prompt": "a", "answer": 3}, r"a dict holds columns, each a list, but 'prompt' is str"),
    (3, "int holds no rows"),
    ([3], "row 0: must be a text or a dict, not int"),
    ([], "no rows in them"),
    ([{"prompt": b"a"}], "row 0: .*bytes"),
    ([{"prompt": "a", "x": float("inf")}], "row 0: "),
])
def test_what_holds_no_rows_is_refused_in_one_line(tmp_path, prompts, why):
    with pytest.raises(UserError, match=why) as error:
        written(prompts, tmp_path)
    assert "\n" not in str(error.value)


def test_names_of_files_among_texts_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    with pytest.raises(UserError, match=r"is a file, but a list of texts is one of prompts: give pathlib\.Path"):
        written([str(file)], tmp_path)


def test_names_stay_names():
    named = ["a.jsonl", Path("a.jsonl"), [Path("a.jsonl")], {"a": "a.jsonl", "b": {"path": Path("b")}}, {"path": "a"}]
    assert all(map(is_named, named))
    assert [as_named(name) for name in named] == [
        "a.jsonl", "a.jsonl", ["a.jsonl"], {"a": "a.jsonl", "b": {"path": "b"}}, {"path": "a"}]
    assert not any(map(is_named, [["a.jsonl"], {}, {"prompt": ["a"]}, [], ROWS]))
