"""`python train.py` as users run it: started, stopped by a signal, and what it leaves."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import ROOT, start_script

MICRO = ["experiment=micro", "checkpoint.every_n_rollouts=1"]
SHORT = [*MICRO, "max_rollouts=8", "validation.every_n_rollouts=3"]


def run(*arguments, script="train.py", expect=0, cwd=ROOT, timeout=300, env=os.environ):
    """Runs a script to its end; returns its exit status and what it wrote. Fails if the status is not ``expect``.

    Args:
        *arguments: of the script.
        script: its path from the root of the project.
        expect: exit status; None accepts any.
        cwd: working directory.
        timeout: seconds.
        env: environment.
    """
    command = [script if cwd == ROOT else str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = start_script(command, cwd, out.fileno(), err.fileno(), env)
        try:
            code = started.wait(timeout)
        except BaseException:
            started.send_signal(signal.SIGKILL)
            raise
        for file in (out, err):
            file.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())
    assert expect is None or done.returncode == expect, done.stdout + done.stderr
    return done


def start(*arguments, script="train.py", stderr=None):
    """Starts a script; returns it, and a file with the lines that it writes, without errors if ``stderr`` is a file."""
    read, write = os.pipe()
    error = write if stderr is None else stderr.fileno()
    process = start_script([script, *map(str, arguments)], ROOT, write, error)
    os.close(write)
    return process, os.fdopen(read)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder):
    """What a run must give again: all but times."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows(folder)]


def run_and_stop(folder, after, how, *arguments, script="train.py"):
    """Starts a run and sends a signal, or several, to its first process once it has reported rollout ``after``."""
    process, written = start(*SHORT, f"hydra.run.dir={folder}", *arguments, script=script)
    output = []
    with written:
        for line in written:
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
