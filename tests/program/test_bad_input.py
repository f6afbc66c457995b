"""Every mistake in the table gets one line that names it, exit code 2, no traceback, and leaves nothing half-written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning import cli
from scripts import errors_page
from tests.bad_input.cases import CASES, QUICK
from tests.command_line import run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_gets_one_line_and_exit_code_two(case, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rewards", None)
    monkeypatch.setattr(sys, "argv", ["train.py", *case.arguments(tmp_path)])
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_with:
        cli.train_main()
    GlobalHydra.instance().clear()
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert exit_with.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), err
    assert case.says in errors[0]
    assert errors_page.shown(errors[0], tmp_path) in PAGE.read_text(), "run scripts/errors_page.py"
    assert "Traceback" not in out + err and "the payload ran" not in out + err
    left = {path.name for path in folder.rglob("*")} if folder.exists() else set()
    assert not left & {"model", "report.html", "summary.json"} and not any(name.endswith(".tmp") for name in left)


def test_there_are_more_than_a_hundred_mistakes_each_with_its_own_name():
    assert len({case.name for case in CASES}) == len(CASES) > 100


# One that Hydra refuses, one that the config's checks refuse, and one where the user's code ends the process.
IN_A_PROCESS = [
    ["objective=gpso"],
    ["optimizer.lr=-1"],
    ["reward.functions.letter_share.function.path=my_rewards.leaves"],
]


@pytest.mark.parametrize("overrides", IN_A_PROCESS, ids=lambda overrides: overrides[0])
def test_the_same_in_a_process_of_its_own(overrides, tmp_path):
    (tmp_path / "my_rewards.py").write_text("import sys\ndef leaves(completions, **_): sys.exit(0)\n")
    done = run(*QUICK, f"hydra.run.dir={tmp_path}/run", *overrides, expect=2, cwd=tmp_path)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists(), "a run that was refused left a folder"


def test_a_secret_in_what_is_wrong_is_masked(tmp_path):
    environment = {**os.environ, "MY_API_KEY": "do-not-tell-7f"}
    done = run(*QUICK, "model.path=/models/${oc.env:MY_API_KEY}/x", expect=2, cwd=tmp_path, env=environment)
    assert "/models/***/x" in done.stderr and "do-not-tell-7f" not in done.stdout + done.stderr
