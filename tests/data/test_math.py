"""conf/data/math.yaml: the last box of a solution, with braces inside braces, becomes the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gspo_lightning.data import RowsTask
from gspo_lightning.errors import UserError

TASK = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / "math.yaml").read_text())["task"]


def task(*solutions):
    rows = [{"problem": f"Problem {n}: {{x}} = ?", "solution": text} for n, text in enumerate(solutions)]
    settings = {key: value for key, value in TASK.items() if key not in ("_target_", "source")}
    return RowsTask(rows, **{**settings, "validation_split": None, "num_validation": 1})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"First \boxed{4},\nthen \boxed{\frac{1}{2}} at last", r"\frac{1}{2}"),
        (r"$\boxed{\sqrt{\frac{3}{x^{2}}}}$", r"\sqrt{\frac{3}{x^{2}}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        ("Lines\nand\n\\boxed{x^{12}}\n", "x^{12}"),
    ],
)
def test_the_answer_is_what_stands_in_the_last_box(solution, answer):
    row = task(solution, solution).train_row(0)
    assert row["answer"] == answer
    assert row["prompt"][0]["content"].endswith(r"Write the answer in \boxed{} at the very end.")


def test_a_solution_without_a_box_is_named():
    with pytest.raises(UserError, match="does not match data.task.patterns.answer"):
        task("no box", "no box either").train_row(0)
