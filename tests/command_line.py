"""`python train.py` as users run it: started, stopped by a signal, and what it leaves."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
MICRO = ["experiment=micro", "checkpoint.every_n_rollouts=1"]
SHORT = [*MICRO, "max_rollouts=8", "validation.every_n_rollouts=3"]


def run(*arguments, script="train.py", expect=0, **popen):
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, **popen
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder):
    """What a run must give again: all but times."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows(folder)]


def run_and_stop(folder, after, how, *arguments, start=("train.py",)):
    """Starts a run and sends a signal, or several, to its first process once it has reported rollout ``after``."""
    command = [sys.executable, *start, *SHORT, f"hydra.run.dir={folder}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith(f"rollout {after}/"):
            for number in how if isinstance(how, tuple) else (how,):
                process.send_signal(number)
    return process.wait(60), "".join(output)


def assert_same_run(folder, whole):
    assert metrics(folder) == metrics(whole)
    assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    ours, expected = (load_file(f / "model" / "model.safetensors") for f in (folder, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def assert_equal_up_to_order(folder, straight, model="model"):
    """Sums over ranks are in another order, which is all that differs."""
    for row, expected in zip(metrics(folder), metrics(straight), strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            assert (row[name] == "") == (expected[name] == ""), name
            if row[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-9, abs=1e-9), name
    ours, expected = (load_file(f / "model" / f"{model}.safetensors") for f in (folder, straight))
    assert ours.keys() == expected.keys()
    assert all((ours[name] - expected[name]).norm() <= 1e-9 * expected[name].norm() for name in expected)
