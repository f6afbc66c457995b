"""SIGKILL at any moment, and at any write: the resumed run ends with the bits of the run that was never killed."""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - here, so that no run imports it again
import peft  # noqa: F401
import pytest
import torch
from safetensors.torch import load_file

from gspo_lightning import cli
from tests.conf.test_every_key import ROWS
from tests.conf.test_groups import given

RUN = ["experiment=micro", "max_rollouts=8", "checkpoint.every_n_rollouts=2", "validation.every_n_rollouts=3",
       "checkpoint.keep_best=val/reward", "ckpt_path=auto", "print_config=false"]  # fmt: skip


ELSEWHERE = "tests.training.test_one_step_off.Elsewhere"
TOGETHER = [
    [
        "lora=language", "objective.beta=0.1", "objective.beta_end=0.5", "optimizer=adamw_8bit", "scheduler=cosine",
        "dynamic_sampling.max_draws=2", "record_tokens=true", "update.num_iterations=2", "checkpoint.keep_last=2", *ROWS,
    ],
    [
        f"rollout.engine._target_={ELSEWHERE}", "~rollout.engine.max_concurrent", "mismatch=sequence_truncate",
        "objective=gspo_token", "objective.beta=0.1", "update.ref_sync_every_n_rollouts=2", "+optimizer.amsgrad=true",
        "advantages._target_=tests.training.test_part_states.RunningMean", "~advantages.scale_rewards",
        "~advantages.baseline",
    ],
]  # fmt: skip
"""What changes the state of a run, in as few runs as can have it."""
WRITES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


def count_writes(folder: str, kill_at: int, counted: Path) -> None:
    """Counts what this process does to names in a folder, in a file; SIGKILL comes before the one of that number."""
    count, process = 0, os.getpid()

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opens or event in WRITES) or folder not in str(arguments[0]) or os.getpid() != process:
            return
        count += 1
        if count == kill_at:
            os.kill(process, signal.SIGKILL)
        os.pwrite(file, f"{count:9d}".encode(), 0)

    file = os.open(counted, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(before)


def start(folder: Path, options: Sequence[str] = (), kill_at: int = 0) -> int:
    """A run in a forked process: nothing is imported again, so that an attempt takes a second."""
    if pid := os.fork():
        return pid
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        torch.set_num_threads(1)
        count_writes(str(folder / "run"), kill_at, folder / "writes.txt")
        cli._train(given(*RUN, *options, run_dir=folder / "run"))
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, a forked child must not return into pytest
        traceback.print_exc()
        os._exit(1)


def finish(folder: Path, options: Sequence[str] = ()) -> None:
    folder.mkdir(exist_ok=True)
    _, status = os.waitpid(start(folder, options), 0)
    assert status == 0, (folder / "log.txt").read_text()[-3000:]


def run_with_kills(folder: Path, rng: random.Random, longest_s: float) -> int:
    """Kills and resumes until the run is through; returns how often it was killed."""
    folder.mkdir()
    kills = 0
    while True:
        pid = start(folder)
        deadline = time.monotonic() + rng.uniform(0.0, longest_s)
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, (folder / "log.txt").read_text()[-3000:]
                return kills
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))} for r in csv.DictReader(file)]


def assert_same(folder: Path, whole: Path) -> None:
    assert rows(folder) == rows(whole)
    assert (folder / "run/completions.jsonl").read_bytes() == (whole / "run/completions.jsonl").read_bytes()
    ours, expected = (load_file(next((f / "run" / "model").glob("*model.safetensors"))) for f in (folder, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    best, expected_best = (torch.load(f / "run/checkpoints/best.ckpt", weights_only=True) for f in (folder, whole))
    assert best["callbacks"]["RolloutCheckpoint"] == expected_best["callbacks"]["RolloutCheckpoint"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in expected_best["state_dict"].items())
    last, expected_last = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
    for name in ("optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(last[name], expected_last[name], rtol=0, atol=0)
    names, expected_names = (sorted(os.listdir(f / "run/checkpoints")) for f in (folder, whole))
    assert names == expected_names
    summary = [name for name in ("summary.json", "report.html") if not (folder / "run" / name).exists()]
    assert not summary


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(kills, tmp_path):
    start_s = time.monotonic()
    finish(tmp_path / "whole")
    longest_s = time.monotonic() - start_s
    rng = random.Random(kills)
    total = runs = 0
    while total < kills:
        runs += 1
        total += run_with_kills(tmp_path / f"killed_{runs}", rng, longest_s)
        assert_same(tmp_path / f"killed_{runs}", tmp_path / "whole")
    print(f"{total} kills in {runs} runs of {longest_s:.1f} s")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", TOGETHER, ids=["adapter", "ahead"])
def test_a_run_killed_at_random_writes_ends_with_the_same_bits(options, kills, tmp_path):
    options = [*options, "max_rollouts=3", "data.prompts_per_rollout=2", "rollout.num_generations=4"]
    finish(tmp_path / "whole", options)
    writes = int((tmp_path / "whole" / "writes.txt").read_text())
    rng, killed, codes = random.Random(kills), tmp_path / "killed", []
    killed.mkdir()
    for _ in range(kills):
        _, status = os.waitpid(start(killed, options, rng.randint(writes // 8, writes // 2)), 0)
        codes.append(os.waitstatus_to_exitcode(status))
    # A run that was resumed may have ended before so many writes.
    assert codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}, (killed / "log.txt").read_text()[-3000:]
    finish(killed, options)
    assert_same(killed, tmp_path / "whole")
