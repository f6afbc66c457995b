"""`scripts/gpu_check.sh` against a stand-in for Python: what it leaves, and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no CUDA elsewhere")

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
case "$2" in
  pytest) echo "${6##*/}: test_one PASSED"; echo $$ >> "$PIDS"; exec sleep 30 ;;
  *) exit 0 ;;
esac
"""


def python_of(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_what_the_tests_have_said_is_there_when_it_is_killed(tmp_path):
    out, names = tmp_path / "results", sorted(file.name for file in (ROOT / "tests/gpu").glob("test_*.py"))
    logs = {name: out / "gpu_tests" / f"{name}.log" for name in names}
    pids = tmp_path / "pids"
    with subprocess.Popen(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), str(out)],
        env={**os.environ, "GSPO_PYTHON": python_of(tmp_path, PYTHON), "PIDS": str(pids)},
    ) as process:
        wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == len(names))
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert {name: log.read_text() for name, log in logs.items()} == {n: f"{n}: test_one PASSED\n" for n in names}
    # A GPU is not left to tests that nobody waits for.
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_python_without_the_packages_is_told_in_one_line(tmp_path):
    # Without the folder of installed packages.
    python = python_of(tmp_path, f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), str(tmp_path)],
        env={**os.environ, "GSPO_PYTHON": python}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"gpu_check: error: {sys.executable} lacks torch,lightning,transformers,peft,bitsandbytes,hydra,torchmetrics,"
        "pytest; run scripts/setup.sh --test, or name another Python with GSPO_PYTHON\n"
    )
