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


def test_copy_prefix_keeps_exactly_the_bytes_asked_for(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(100)))
    assert files.copy_prefix(source, tmp_path / "target", 37) == 37
    assert (tmp_path / "target").read_bytes() == bytes(range(37))
    os.link(source, tmp_path / "link")
    assert files.copy_prefix(source, tmp_path / "link", 90) == 90
    assert files.copy_prefix(source, source, 1000) == 90
    assert source.read_bytes() == bytes(range(90))
    with pytest.raises(FileNotFoundError):
        files.copy_prefix(tmp_path / "nowhere", tmp_path / "target", 1)
