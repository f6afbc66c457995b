"""``metrics.csv``: one row per rollout, columns that may be added later, and truncation to n rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from gspo_lightning.callbacks.files import replace_end, replace_file


class MetricsTable:
    """A CSV file whose first column is ``step``.

    Numbers are written in the shortest form that reads back as the same float, so equal runs give equal text.
    The file is only ever appended to or replaced as a whole: it never holds fewer rows than were written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows = 0
        self._newest: dict[str, str] = {}
        self._newest_at = 0  # where its line begins, in bytes

    def write(self, row: Mapping[str, float | None]) -> None:
        """Appends a row; a row with the step of the newest one is merged into that one instead."""
        cells = {name: _cell(value) for name, value in row.items()}
        completes = self.rows > 0 and self._newest["step"] == cells["step"]
        if completes:
            cells = {**self._newest, **cells}
        new = [name for name in cells if name not in self.columns]
        if completes and not new:  # without reading the rows: a validation completes one for each of a long run
            replace_end(self.path, self._newest_at, _line(self._in_order(cells)))
        elif new or not self.rows:
            kept = read_table(self.path)[1][: self.rows - completes] if self.rows else []
            self.columns += new
            self._replace([*kept, self._in_order(cells)])
        else:
            with self.path.open("ab") as file:
                self._newest_at = file.tell()
                file.write(_line(self._in_order(cells)).encode())
        self.rows += not completes
        self._newest = cells

    def take_over(self, source: Path, rows: int) -> int:
        """Takes over the first ``rows`` rows of ``source``, which may be the same file; returns their number.

        A last row that was cut short is none.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self.columns, lines = _whole_rows(source)
        kept = lines[:rows]
        self.rows = len(kept)
        self._replace(kept)
        self._newest = dict(zip(self.columns, kept[-1], strict=False)) if kept else {}
        return self.rows

    def _in_order(self, cells: Mapping[str, str]) -> list[str]:
        return [cells.get(name, "") for name in self.columns]

    def _replace(self, rows: Iterable[list[str]]) -> None:
        padded = (row + [""] * (len(self.columns) - len(row)) for row in rows)
        lines = [_line(self.columns), *map(_line, padded)]
        replace_file(self.path, "".join(lines))
        self._newest_at = self.path.stat().st_size - len(lines[-1].encode("utf-8", "backslashreplace"))


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, both empty if it is empty."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = list(csv.reader(file))
    return (lines[0], lines[1:]) if lines else ([], [])


def _whole_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """`read_table` without a last line that was cut short: it has no end, or too few cells."""
    columns, rows = read_table(path)
    is_cut = not path.read_bytes().endswith(b"\n")
    if not rows:
        return ([] if is_cut else columns), rows
    return columns, rows[:-1] if is_cut or len(rows[-1]) < len(columns) else rows


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def _line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
