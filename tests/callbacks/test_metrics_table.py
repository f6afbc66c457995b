"""metrics.csv: late columns, completed rows, exact numbers, and never fewer rows than were written."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gspo_lightning.callbacks import files, metrics_table
from gspo_lightning.callbacks.metrics_table import MetricsTable


def test_columns_may_come_late_and_a_second_write_of_a_step_completes_its_row(tmp_path):
    table = MetricsTable(tmp_path / "m.csv")
    table.write({"step": 0, "val": 0.5})
    table.write({"step": 1, "loss": 0.1})
    table.write({"step": 2, "loss": 0.2})
    table.write({"step": 2, "val": 0.75})
    table.write({"step": 3, "loss": None})
    assert (tmp_path / "m.csv").read_text() == "step,val,loss\n0,0.5,\n1,,0.1\n2,0.75,0.2\n3,,\n"
    assert table.rows == 4


def test_every_float_reads_back_bit_identical_and_names_with_commas_survive(tmp_path):
    values = [0.1 + 0.2, 1e-300, 2.0**60, -0.0, 1 / 3, float("inf")]
    table = MetricsTable(tmp_path / "m.csv")
    for step, value in enumerate(values):
        table.write({"step": step, 'a,"b"': value})
    columns, rows = metrics_table.read_table(tmp_path / "m.csv")
    assert columns == ["step", 'a,"b"']
    assert [float(row[1]).hex() for row in rows] == [value.hex() for value in values]


def test_numbers_of_other_libraries_are_written_as_plain_numbers(tmp_path):
    table = MetricsTable(tmp_path / "m.csv")
    table.write({"step": 1, "numpy": np.float64(0.1), "torch": torch.tensor(0.5), "flag": True})
    assert (tmp_path / "m.csv").read_text() == "step,numpy,torch,flag\n1,0.1,0.5,1\n"


@pytest.mark.parametrize("same_file", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_taking_over_n_rows_and_going_on_gives_the_table_of_a_run_never_stopped(rows, same_file, tmp_path):
    def write(table, steps):
        for step in steps:
            table.write({"step": step, "a": step / 7, **({"b": 1.0} if step >= 1 else {})})

    whole, cut = MetricsTable(tmp_path / "whole.csv"), MetricsTable(tmp_path / "cut.csv")
    write(whole, range(4))
    write(cut, range(3))
    with (tmp_path / "cut.csv").open("a") as file:
        file.write("3,0.4")  # the crash came in the middle of a row
    new = MetricsTable(tmp_path / ("cut.csv" if same_file else "new.csv"))
    assert new.take_over(tmp_path / "cut.csv", rows) == rows
    write(new, range(rows, 4))
    assert new.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_row_is_completed_without_reading_those_before_it(taken_over, tmp_path, monkeypatch):
    """Else a run with a validation after each rollout takes longer the longer it has run."""
    table = MetricsTable(tmp_path / "m.csv")
    for row in ({"step": 0, "ü": 0.5}, {"step": 1, "ü": 0.125, "val": 0.25}, {"step": 2, "ü": 0.5, "val": 1.0}):
        table.write(row)
    if taken_over:
        table.take_over(table.path, 2)
        table.write({"step": 1, "val": 0.75})
        table.write({"step": 2, "ü": 0.5})
    monkeypatch.setattr(metrics_table, "read_table", lambda path: pytest.fail("read all rows"))
    table.write({"step": 2, "val": 0.0625})
    table.write({"step": 2, "val": 0.5})  # a shorter line
    table.write({"step": 3, "ü": 0.5})
    table.write({"step": 3, "val": 0.25})
    first = "1,0.125,0.75" if taken_over else "1,0.125,0.25"
    assert table.path.read_text(encoding="utf-8") == f"step,ü,val\n0,0.5,\n{first}\n2,0.5,0.5\n3,0.5,0.25\n"
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_row_taken_over_can_be_completed(tmp_path):
    old, new = MetricsTable(tmp_path / "old.csv"), MetricsTable(tmp_path / "new.csv")
    old.write({"step": 4, "a": 0.1})
    new.take_over(old.path, 1)
    new.write({"step": 4, "val": 0.25})
    assert new.path.read_text() == "step,a,val\n4,0.1,0.25\n"
    assert new.rows == 1


def test_a_crash_while_a_row_is_completed_or_a_column_added_loses_nothing(tmp_path, monkeypatch):
    table = MetricsTable(tmp_path / "m.csv")
    table.write({"step": 1, "a": 0.1})
    before = table.path.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    for row in ({"step": 1, "a": 0.2}, {"step": 2, "b": 0.3}):
        with pytest.raises(KeyboardInterrupt):
            table.write(row)
        assert table.path.read_text() == before


@pytest.mark.parametrize("cut", range(1, 32))
def test_a_last_row_that_was_cut_anywhere_is_not_taken_over(cut, tmp_path):
    table = MetricsTable(tmp_path / "m.csv")
    for step in range(3):
        table.write({"step": step, "a": step + 0.25, "b": step + 0.125})
    text = table.path.read_text()
    assert text == "step,a,b\n0,0.25,0.125\n1,1.25,1.125\n2,2.25,2.125\n"
    table.path.write_text(text[:-cut])
    whole = [line for line in text[:-cut].splitlines(keepends=True)[1:] if line.endswith("5\n")]
    new = MetricsTable(table.path)
    assert new.take_over(table.path, 3) == new.rows == len(whole) == (2 if cut < 14 else 1 if cut < 27 else 0)
    assert table.path.read_text() == "step,a,b\n" + "".join(whole)


def test_a_header_that_was_cut_is_none_and_a_row_without_all_its_cells_neither(tmp_path):
    for text in ("step,val/acc", ""):
        (tmp_path / "m.csv").write_text(text)
        table = MetricsTable(tmp_path / "m.csv")
        assert table.take_over(table.path, 3) == 0 and table.columns == []
        table.write({"step": 4, "val/accuracy": 0.5})
        assert table.path.read_text() == "step,val/accuracy\n4,0.5\n"
    table.path.write_text("step,a\n1,0.5\n2\n")
    assert table.take_over(table.path, 2) == 1


@pytest.mark.parametrize("same_file", [True, False])
@pytest.mark.parametrize(
    ("content", "size", "kept"),
    [
        (b"ab\ncd\nef\n", 6, 6), (b"ab\ncd\nef\n", 99, 9), (b"ab\ncd\nef", 9, 6), (b"ab\ncd\nef\n", 8, 6),
        (b"ab", 3, 0), (b"", 3, 0), (b"ab\n", 0, 0), (b"ab\n" + b"x" * 150_000, 150_003, 3),
    ],
)  # fmt: skip
def test_copy_prefix_keeps_the_whole_lines_of_the_bytes_asked_for(content, size, kept, same_file, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    if same_file:
        os.link(source, target)
    assert files.copy_prefix(source, target, size) == kept
    assert target.read_bytes() == content[:kept]
    if not same_file:
        assert source.read_bytes() == content


def test_copy_prefix_of_a_file_that_is_missing_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.copy_prefix(tmp_path / "nowhere", tmp_path / "target", 1)
    assert not list(tmp_path.iterdir())
