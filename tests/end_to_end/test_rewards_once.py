"""A reward of the user's is made once per run: it may load a model, or open a connection."""

from __future__ import annotations

import os

import pytest

from tests.command_line import run

JUDGE = """
import random
from pathlib import Path

class Judge:
    def __init__(self, folder):
        with open(Path(folder) / "made.txt", "a") as file:
            file.write(f"{random.random()}\\n")

    def __call__(self, completions, **columns):
        return [float(len(str(text)) % 3) for text in completions]
"""


@pytest.mark.slow
def test_a_reward_is_made_once_and_draws_the_same_numbers_in_every_run(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    spec = f"{{_target_: gspo_lightning.rewards.RewardSpec, function: {{_target_: judge.Judge, folder: {tmp_path}}}}}"
    arguments = ["experiment=micro", "max_rollouts=1", f"+reward.functions.judge={spec}"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    run(*arguments, f"hydra.run.dir={tmp_path}/run", env=environment)
    run(*arguments, f"hydra.run.dir={tmp_path}/again", env=environment)
    run(*arguments[:1], arguments[2], f"hydra.run.dir={tmp_path}/measured", script="evaluate.py", env=environment)
    first, again, _ = (tmp_path / "made.txt").read_text().splitlines()
    assert first == again
