"""The tree shows every setting of a config once, and nothing in it is markup."""

from __future__ import annotations

import io

from rich.console import Console

from gspo_lightning.report.config_tree import config_tree


def drawn(plain):
    out = io.StringIO()
    Console(file=out, width=200).print(config_tree(plain))
    return out.getvalue()


def test_groups_are_branches_with_the_class_and_their_settings():
    text = drawn(
        {
            "seed": 3,
            "objective": {"_target_": "a.b.Objective", "epsilon": 0.1, "beta": None},
            "reward": {
                "_target_": "RewardSet",
                "functions": {"f": {"function": {"_target_": "hydra.utils.get_method", "path": "my.f"}}},
            },
            "stop": [],
            "empty": {},
        }
    )
    lines = [line.strip("│├└─ ") for line in text.splitlines()]
    assert lines[1] == "seed=3  stop=[]  empty={}"
    assert "objective Objective" in lines and "epsilon=0.1  beta=None" in lines
    assert "function my.f" in lines and "get_method" not in text


def test_square_brackets_of_values_stay_text():
    assert "template=[bold]{x}[/bold]" in drawn({"a": {"template": "[bold]{x}[/bold]"}})
