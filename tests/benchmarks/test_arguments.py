"""The scripts that measure refuse what they could not do or write before they measure, in one line."""

from __future__ import annotations

import os

import pytest

from benchmarks import arguments
from tests.command_line import run

OTHER = '{"a": 1}'


def script(name, *options, **environment):
    """(Exit code, the last line of what it says); fails where a traceback is said."""
    done = run(*options, script=f"scripts/{name}.py", expect=None, env=environment or os.environ)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "x", "", "²"])
def test_a_number_that_is_none_is_refused(text):
    with pytest.raises(arguments.argparse.ArgumentTypeError, match=f"^{text!r} is not a whole number of at least 1$"):
        arguments.positive(text)


def test_what_cannot_be_written_or_holds_something_else_is_refused_and_a_new_folder_is_made(tmp_path):
    (tmp_path / "empty.json").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "latin.json").write_bytes(b"\xff{}")
    refused = {
        "": " is a folder; name a file$",
        "empty.json": "holds no results; name another file, or remove it$",
        "list.json": "holds no results",
        "latin.json": "holds no results",
        "empty.json/x.json": r"cannot make its folder \((File exists|Not a directory)\)$",
    }
    for name, line in refused.items():
        with pytest.raises(arguments.argparse.ArgumentTypeError, match=line):
            arguments.results_file(str(tmp_path / name))
    assert arguments.results_file(str(tmp_path / "new" / "x.json")).parent.is_dir()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("soak", ["--rollouts"], "soak.sh: error: unrecognized arguments: --rollouts"),
        ("soak", ["5"], "soak.sh: error: argument ROLLOUTS: '5' is not a number of rollouts of at least 200"),
        ("benchmark", ["--rounds", "0"], "benchmark.py: error: argument --rounds: '0' is not a whole number of at least 1"),
        ("quality_per_time", ["--plot-only", "--out", "{tmp}/none.json"], "{tmp}/none.json is not there; --plot-only draws"),
        ("quality_per_time", ["--plot-only", "--out", "{tmp}/other.json"], "{tmp}/other.json has no curves: it is of another"),
        ("quality_per_time", ["--out", "{tmp}/x.json"], "error: TRL is not installed; run bash scripts/setup.sh --peers"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_wrong_arguments_end_a_script_in_one_line(name, options, says, tmp_path):
    (tmp_path / "other.json").write_text(OTHER)
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    code, line = script(name, *options, GSPO_PEERS_VENV=str(tmp_path), PATH="")
    assert code in (1, 2) and says.replace("{tmp}", str(tmp_path)) in line


def test_results_of_another_measurement_are_refused(tmp_path):
    (tmp_path / "x.json").write_text(OTHER)
    with pytest.raises(SystemExit, match="x.json has no rows: it is of another measurement; name another file"):
        arguments.read_results(tmp_path / "x.json", "a", "rows")
    assert arguments.read_results(tmp_path / "none.json", "rows") == {}


def test_a_model_that_cannot_be_made_says_why(monkeypatch, capfd, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as ended:
        arguments.quickstart_model()
    assert ended.value.code == 2
    assert capfd.readouterr().err == (
        f"error: cannot make the model cache {tmp_path}/file/models (Not a directory); set GSPO_CACHE\n"
    )
