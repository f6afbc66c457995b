"""The table of objectives is the code's, and every objective has a page and a config."""

from __future__ import annotations

from pathlib import Path

from gspo_lightning.objective import LOSSES
from gspo_lightning.objective.table import table

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_code():
    assert table() in (ROOT / "docs" / "objectives" / "README.md").read_text()


def test_every_loss_has_a_page_and_a_config():
    for name in LOSSES:
        assert f"objective.loss_type={name}" in (ROOT / "docs" / "objectives" / f"{name}.md").read_text()
        assert any(f"loss_type: {name}\n" in file.read_text() for file in (ROOT / "conf" / "objective").glob("*.yaml"))
