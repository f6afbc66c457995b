"""The table of objectives is the code's, and every objective has a page and a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gspo_lightning.objective import LOSSES, Objective
from gspo_lightning.objective.table import table

ROOT = Path(__file__).parents[2]
README = (ROOT / "docs" / "objectives" / "README.md").read_text()


def test_the_table_is_that_of_the_code():
    assert table() in README


def test_the_loss_of_ones_own_on_the_page_is_what_the_page_says():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    names = {}
    exec(snippet, names)
    objective = Objective(max_completion_length=4, importance_sampling_level="token", loss_type=names["CAPPED"])
    old, advantages = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    new = torch.tensor([1.2, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    loss = objective(new, old, advantages, torch.tensor([0, 0, 1]), torch.tensor([2, 1])).loss
    assert loss.item() / objective.denominator(2, 3) == pytest.approx((-1.2 - 1.3 + 2 * 0.5) / 3)
    assert torch.autograd.grad(loss, new)[0].tolist() == pytest.approx([-1.2, 0.0, 1.0])


def test_the_config_lists_the_losses_to_choose_from():
    lines = (ROOT / "conf" / "_objective.yaml").read_text().replace("\n# ", " ")
    assert f" {' | '.join(LOSSES)}, or a loss of your own: " in lines


def test_every_loss_has_a_page_and_a_config():
    for name in LOSSES:
        assert f"objective.loss_type={name}" in (ROOT / "docs" / "objectives" / f"{name}.md").read_text()
        assert any(f"loss_type: {name}\n" in file.read_text() for file in (ROOT / "conf" / "objective").glob("*.yaml"))
