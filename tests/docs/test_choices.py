"""Every choice of a config group that a page lists in a table has its row, and no row is of another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("group", "page"), [("data", "data"), ("reward", "rewards"), ("advantages", "objectives/README")]
)
def test_every_choice_has_a_row(group, page):
    _, table = (ROOT / "docs" / f"{page}.md").read_text().split(f"\n| `{group}=` |")
    rows = re.findall(r"^\| `(\w+)`", table.split("\n\n")[0], re.MULTILINE)
    assert sorted(rows) == sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))
