"""Local files: values stay what the file says, and a mistake names its line."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest

from gspo_lightning.data.files import is_file, read_file, read_hub
from gspo_lightning.errors import UserError


def _write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_values_are_not_reinterpreted(tmp_path: Path) -> None:
    jsonl = _write(tmp_path, "a.jsonl", '{"answer": "007", "day": "2020-01-01"}\n\n{"answer": 7}\n')
    assert read_file(jsonl) == [{"answer": "007", "day": "2020-01-01"}, {"answer": 7}]
    table = _write(tmp_path, "a.csv", '\ufeffquestion,answer\n"two\nlines, and a comma",007\n')
    assert read_file(table) == [{"question": "two\nlines, and a comma", "answer": "007"}]
    assert read_file(_write(tmp_path, "a.json", '[{"answer": "1,234"}]')) == [{"answer": "1,234"}]


def test_json_with_an_object_a_line_is_read_by_lines(tmp_path: Path) -> None:
    lines = '\ufeff\n{"answer": "007"}\r\n{"answer": "a\u2028b"}\n'
    assert read_file(_write(tmp_path, "a.json", lines)) == [{"answer": "007"}, {"answer": "a\u2028b"}]
    with pytest.raises(UserError, match=r"a\.json line 2: not valid JSON \(Expecting value"):
        read_file(_write(tmp_path, "a.json", '{"a": 1}\n{"a": \n'))


def test_compressed_text_is_read_as_the_text_in_it(tmp_path: Path) -> None:
    """And not by ``datasets``, also in a folder: its types are guessed."""
    (tmp_path / "folder").mkdir()
    lines = b'{"answer": "2020-01-01"}\n{"answer": "007"}\n'
    folder = tmp_path / "folder"
    for name, text in {"a.jsonl.gz": lines, "a.JSON.GZ": lines, "a.csv.gz": b"answer\n2020-01-01\n007\n"}.items():
        assert read_file(_write(tmp_path, name, gzip.compress(text))) == [{"answer": "2020-01-01"}, {"answer": "007"}]
    _write(folder, "train.jsonl.gz", gzip.compress(lines))
    assert read_hub(str(folder), None, "train") == [{"answer": "2020-01-01"}, {"answer": "007"}]


def test_a_field_of_a_table_may_be_long(tmp_path: Path) -> None:
    text = "长" * 200_000
    (row,) = read_file(_write(tmp_path, "a.csv", f"prompt,answer\n{text},1\n"))
    assert row == {"prompt": text, "answer": "1"}
    assert csv.field_size_limit() == 131_072


def test_parquet_rows_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]).to_parquet(path)
    rows = read_file(str(path))
    assert [rows[i] for i in range(len(rows))] == [
        {"prompt": "p", "answer": "1"},
        {"prompt": "q", "answer": "2"},
    ]
    with pytest.raises(UserError, match=r"not a readable Parquet file \(Parquet file size is 2 bytes"):
        read_file(_write(tmp_path, "b.parquet", "no"))


def test_what_a_parquet_file_lacks_or_has_too_much_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow.parquet import write_table

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    counts = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    twice = pa.Table.from_arrays([pa.array(["p"])] * 2, names=["prompt", "prompt"])
    for table, line in (
        (pa.table({"prompt": pa.array([], pa.string())}), "x.parquet: the dataset is empty"),
        (pa.table({"prompt": ["p"], "counts": counts}), r"not a readable Parquet file \(Arrow type map<"),
        (twice, r"not a readable Parquet file \(Multiple matches for FieldRef.Name\(prompt\)"),
    ):
        write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError, match=line):
            read_file(str(tmp_path / "x.parquet"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_table(twice, folder / "x.parquet")
    with pytest.raises(UserError, match=r"split train: cannot load it: Multiple matches for FieldRef"):
        read_hub(str(folder), None, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n["a"]\n', r"a\.jsonl line 2: expected an object with columns, found list"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}\n", r"a\.jsonl line 2: not valid JSON \(Exceeds the limit"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", r"a\.jsonl line 1: .* too deep"),
        ("a.json", '{"a": 1}', r"a\.json: expected a list of objects, found one dict"),
        ("a.json", '[{"a": 1}, 5]', r"a\.json row 1: expected an object with columns, found int"),
        ("a.json", '[{"a": 1}]\n5', r"a\.json: not valid JSON \(Extra data: line 2 column 1"),
        ("a.json", '{"a": 1},\n{"a": 2}', r"a\.json: not valid JSON \(Extra data: line 1 column 9"),
        ("a.json", "[]", r"a\.json: the dataset is empty"),
        ("a.jsonl", "", r"a\.jsonl: the dataset is empty"),
        ("a.parquet", "", r"a\.parquet: the dataset is empty"),
        ("a.csv", "a,b\n", r"a\.csv: the dataset is empty"),
        ("a.csv", "a,b,b\n1,2,3\n", r"a\.csv line 1: two columns are named 'b'; rename one"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv line 3: the number of fields differs"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv line 2: the number of fields differs"),
        ("a.csv", 'a,b\n1,2\n"3"x,4\n5,6\n', r"a\.csv line 3: ',' expected after '\"'"),
        ("a.csv", b"a\n\xff\n", r"a\.csv: not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz: the dataset is empty"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n["a"]\n', mtime=0),
            r"a\.jsonl\.gz line 2: expected an object with columns",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
            r"cannot read the file \(Compressed file ended before",
        ),
        (
            "a.csv.gz",
            gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20,
            r"cannot read the file \(Error -3 while decompress",
        ),
        ("a.csv.gz", "a\n1\n", r"a\.csv\.gz: cannot read the file \(Not a gzipped file"),
        ("a.parquet.gz", "a", r"a\.parquet\.gz: unknown file type; use one of \.json, \.jsonl, \.csv, \.parquet"),
        ("a.txt", "a", r"a\.txt: unknown file type; use one of \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_file(_write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_and_is_no_hub_dataset(tmp_path: Path) -> None:
    assert is_file("nowhere/rows.jsonl") and not is_file("openai/gsm8k")
    assert is_file("nowhere/rows.jsonl.gz") and is_file("rows.parquet.gz") and not is_file("openai/gz")
    with pytest.raises(UserError, match=r"nowhere/rows\.jsonl: cannot read the file \(No such file"):
        read_file("nowhere/rows.jsonl")


def test_a_hub_dataset_that_cannot_be_reached_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.task\.source=no-one/nothing, split train: cannot load it") as caught:
        read_hub("no-one/nothing", None, "train")
    assert "\n" not in str(caught.value)


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four rows with classes, of which the last has none."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = datasets.Features({"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    return datasets.Dataset.from_dict({"prompt": list("abcd"), "label": [0, 1, None, -1]}, features=kinds)


def test_classes_are_names_in_a_file_and_in_its_folder_and_none_is_null(labelled: Any, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    labelled.to_parquet(tmp_path / "hub" / "train.parquet")
    for rows in (read_file(str(tmp_path / "hub" / "train.parquet")), read_hub(str(tmp_path / "hub"), None, "train")):
        assert [row["label"] for row in rows] == ["no", "yes", None, None]


def test_a_folder_of_save_to_disk_is_read_by_its_split(labelled: Any, tmp_path: Path) -> None:
    import datasets

    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    labelled.save_to_disk(one)
    datasets.DatasetDict({"train": labelled, "test": labelled.select([1])}).save_to_disk(several)
    assert [row["label"] for row in read_hub(one, None, "train")] == ["no", "yes", None, None]
    assert list(read_hub(several, None, "test")) == [{"prompt": "b", "label": "yes"}]
    with pytest.raises(UserError, match=r"one: there is no split test; the folder has train, which cannot be sliced"):
        read_hub(one, None, "test")
    with pytest.raises(
        UserError, match=r"several: there is no split dev; the folder has train, test, which cannot be sliced"
    ):
        read_hub(several, None, "dev")
    with pytest.raises(UserError, match=r"data\.task\.config_name=main has no effect on a folder of save_to_disk"):
        read_hub(one, "main", "train")


def test_a_file_of_a_folder_may_be_json_lines_or_empty_but_not_all(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "full", "train-0.json", '{"q": "a"}\n{"q": "b", "n": 2}\n')
    _write(tmp_path / "full", "train-1.jsonl", "")
    _write(tmp_path / "empty", "train-0.jsonl", "")
    _write(tmp_path / "empty", "train-1.csv", "q\n")
    assert list(read_hub(str(tmp_path / "full"), None, "train")) == [{"q": "a"}, {"q": "b", "n": 2}]
    with pytest.raises(UserError, match=r"empty, split train: the dataset is empty"):
        read_hub(str(tmp_path / "empty"), None, "train")


def test_values_of_tables_in_a_folder_stay_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("tables", "lines", "told"):
        (tmp_path / name).mkdir()
    _write(tmp_path / "tables", "train-00000-of-00002.csv", "q,answer\na,0017\nb,NA\n")
    _write(tmp_path / "tables", "train-00001-of-00002.csv", "q,answer\nc,\n")
    _write(tmp_path / "tables", "test.csv", "q,answer\nd,1.50\n")
    _write(tmp_path / "lines", "train.jsonl", '{"answer": "2020-01-01"}\n{"answer": "2020-01-02", "more": 1}\n')
    _write(tmp_path / "told", "train.csv", "q;answer\na;0017\n")
    told = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n---\n"
    _write(tmp_path / "told", "README.md", told)
    for _ in range(2):  # the second time a cache may know better
        rows = list(read_hub(str(tmp_path / "tables"), None, "train"))
        assert rows == [{"q": "a", "answer": "0017"}, {"q": "b", "answer": "NA"}, {"q": "c", "answer": ""}]
        assert list(read_hub(str(tmp_path / "tables"), None, "test")) == [{"q": "d", "answer": "1.50"}]
        rows = list(read_hub(str(tmp_path / "lines"), None, "train"))
        assert rows == [{"answer": "2020-01-01"}, {"answer": "2020-01-02", "more": 1}]
        assert list(read_hub(str(tmp_path / "told"), None, "train")) == [{"q": "a", "answer": 17}]
    assert list(read_hub(str(tmp_path / "tables"), None, "train[:1]")) == [{"q": "a", "answer": 17.0}]
    with pytest.raises(UserError, match="tables, split dev: cannot load it"):
        read_hub(str(tmp_path / "tables"), None, "dev")
    _write(tmp_path / "tables", "test.csv", "q,answer\nd\n")
    with pytest.raises(UserError, match=r"test\.csv line 2: the number of fields differs"):
        read_hub(str(tmp_path / "tables"), None, "test")


def test_a_folder_in_the_home_folder_is_read_whatever_is_in_it(
    labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("lines", "hub"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    labelled.to_parquet(tmp_path / "hub" / "train.parquet")
    assert [row["prompt"] for row in read_hub("~/lines", None, "train")] == ["a", "b"]
    assert [row["prompt"] for row in read_hub("~/hub", None, "train")] == ["a", "b", "c", "d"]
