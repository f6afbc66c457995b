"""One of two ranks fails or is killed: the other ends within seconds, and the last line is the first error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_lightning import first_error

ROOT = Path(__file__).parents[2]
REWARDS = """
import os, signal
def f(completions, **_):
    if os.environ.get("LOCAL_RANK", "0") == os.environ["DIES"]:
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("on purpose")
    return [0.0, 1.0] * (len(completions) // 2)
"""
RAISED = "reward function letter_share raised ZeroDivisionError: on purpose"


@pytest.mark.parametrize(
    ("how", "rank", "code", "last"),
    [
        ("raise", "1", 2, f"error: rank 1: {RAISED}"),
        ("raise", "0", 2, RAISED),
        ("kill", "1", -9, "[rank: 1] Child process with PID"),
    ],
)
def test_the_others_end_too_and_the_first_error_is_the_last_line(how, rank, code, last, tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    command = [
        sys.executable, str(ROOT / "train.py"), "experiment=micro", "trainer=ddp", "trainer.accelerator=cpu", "print_config=false",
        "hydra.run.dir=run", "reward.functions.letter_share.function.path=my_rewards.f",
    ]  # fmt: skip
    environment = {**os.environ, "DIES": rank, "HOW": how, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # Within a minute, start-up included: nobody waits for the rank that has gone.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().splitlines()[-1].count(last) == 1, done.stderr


def test_the_first_error_is_kept_and_silence_is_said(tmp_path):
    assert first_error.first(tmp_path, wait_s=0.1) == (first_error.DIED, 1)
    first_error.join(tmp_path, 3, 4)
    first_error.record(tmp_path, "the cause", 4)
    first_error.record(tmp_path, "a consequence", 2)
    assert first_error.first(tmp_path) == ("rank 3: the cause", 4)
    first_error.join(tmp_path, 0, 1)
    assert not first_error.several_ranks() and not (tmp_path / first_error.NAME).exists()


def test_only_the_loss_of_a_rank_is_taken_for_one():
    assert first_error.lost_a_rank(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not first_error.lost_a_rank(RuntimeError("shapes cannot be multiplied"))
    assert not first_error.lost_a_rank(ValueError("Connection closed by peer"))
