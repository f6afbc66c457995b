"""Reading the files of a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Series = list[tuple[float, float]]


def read_metrics(run_dir: Path) -> dict[str, Series]:
    """Column -> (step, value) where the column has a value."""
    series: dict[str, Series] = {}
    with (run_dir / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = float(row["step"])
            for name, cell in row.items():
                if name != "step" and cell not in ("", "nan", "inf", "-inf", None):
                    series.setdefault(name, []).append((step, float(cell)))
    return series


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content
