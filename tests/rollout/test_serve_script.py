"""`scripts/serve_rollouts.sh`: which environment it takes, and how it ends. A stand-in is its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/serve_rollouts.sh"

# Answers what the script asks; servers end with what the test says.
PYTHON = """#!/bin/sh
echo "$0" >> "$CALLS"
case "$*" in
  *"--port 8000"*) exit "${ENDS_0:-0}" ;;
  *"--port 8001"*) exit "${ENDS_1:-0}" ;;
  *find_spec*) exit "${NO_VLLM:-0}" ;;
  *resolve_model*) echo /the/model ;;
  *choose_precision*) echo float32 ;;
esac
"""


@pytest.fixture()
def serve(tmp_path):
    """``serve("an environment", ..., arguments=[...], VARIABLE=...)``: the outcome, and the environments it used."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")

    def run(*environments, arguments=(), **variables):
        for name in environments:
            python = tmp_path / name / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text(PYTHON)
            python.chmod(0o755)
        given = {name: str(tmp_path / value) if "VENV" in name else value for name, value in variables.items()}
        result = subprocess.run(
            ["bash", str(tmp_path / "scripts" / SCRIPT.name), *arguments],
            env={"PATH": os.environ["PATH"], "CALLS": str(tmp_path / "calls"), **given},
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return result, {Path(call).parents[1].name for call in calls}

    return run


@pytest.mark.parametrize(
    ("environments", "variables", "taken"),
    [
        ([".venv", ".venv-vllm"], {}, ".venv-vllm"),
        ([".venv"], {}, ".venv"),
        ([".venv", "mine"], {"GSPO_VENV": "mine"}, "mine"),
        ([".venv", ".venv-vllm", "mine"], {"GSPO_VENV": "mine"}, ".venv-vllm"),  # mine is the trainer's, for setup.sh
        ([".venv-vllm", "mine", "a b"], {"GSPO_VENV": "mine", "GSPO_VLLM_VENV": "a b"}, "a b"),
    ],
)
def test_it_takes_the_environment_that_setup_made(environments, variables, taken, serve):
    result, used = serve(*environments, **variables)
    assert (result.returncode, used) == (0, {taken}), result.stderr


def test_an_environment_that_is_not_there_or_has_no_vllm_is_one_line(serve):
    result, used = serve(".venv", GSPO_VLLM_VENV="gone")
    assert (result.returncode, used, len(result.stderr.splitlines())) == (1, set(), 1)
    assert "error: there is no environment in " in result.stderr and "/gone; run scripts/setup.sh" in result.stderr
    result, used = serve(NO_VLLM="1")
    assert (result.returncode, used, len(result.stderr.splitlines())) == (1, {".venv"}, 1)
    assert "/.venv; run scripts/setup.sh --vllm-cpu, or set GSPO_VLLM_VENV to" in result.stderr
    result, _ = serve(NO_VLLM="1", arguments=["--print"])  # for another machine
    assert result.returncode == 0 and result.stdout.count("api_server") == 1


@pytest.mark.parametrize(("ends", "status"), [((0, 0), 0), ((3, 0), 3), ((0, 3), 3)])
def test_a_server_that_failed_is_its_own_status(ends, status, serve):
    result, _ = serve(".venv", arguments=["--servers", "2"], ENDS_0=str(ends[0]), ENDS_1=str(ends[1]))
    assert result.returncode == status, result.stderr
