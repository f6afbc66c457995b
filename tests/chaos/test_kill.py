"""SIGKILL at any moment: the resumed run ends with the bits of the run that was never killed."""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_lightning import cli
from tests.conf.test_groups import given

RUN = ["experiment=micro", "max_rollouts=8", "checkpoint.every_n_rollouts=2", "validation.every_n_rollouts=3",
       "checkpoint.keep_best=val/reward", "ckpt_path=auto", "print_config=false"]  # fmt: skip


def start(folder: Path) -> int:
    """A run in a forked process: nothing is imported again, so that an attempt takes a second."""
    if pid := os.fork():
        return pid
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        torch.set_num_threads(1)
        cli._train(given(*RUN, run_dir=folder / "run"))
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, a forked child must not return into pytest
        traceback.print_exc()
        os._exit(1)


def finish(folder: Path) -> None:
    folder.mkdir()
    _, status = os.waitpid(start(folder), 0)
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
    ours, expected = (load_file(f / "run" / "model" / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    best, expected_best = (torch.load(f / "run/checkpoints/best.ckpt", weights_only=True) for f in (folder, whole))
    assert best["callbacks"]["RolloutCheckpoint"] == expected_best["callbacks"]["RolloutCheckpoint"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in expected_best["state_dict"].items())
    summary = [name for name in ("summary.json", "report.html") if not (folder / "run" / name).exists()]
    assert not summary


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
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
