"""Ctrl-C where no rollout is in hand: one line, exit code 130, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning import cli
from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.program import interrupt as interrupt_module
from gspo_lightning.program import training_run

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = [
    "experiment=micro", "max_rollouts=1", "print_config=false", "data.prompts_per_rollout=2", "update.num_minibatches=1",
    "objective=reinforce", "data.task.num_validation=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _handlers():
    """Lightning ignores Ctrl-C from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def ended(monkeypatch, capfd, *arguments, main=cli.train_main):
    """The lines of standard error of a command that ends with code 130."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), *QUICK])
    with pytest.raises(SystemExit) as end:
        main()
    GlobalHydra.instance().clear()
    assert end.value.code == 130
    return capfd.readouterr().err.splitlines()


AT_IMPORT = """
import os, runpy, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
"""
COMMAND = "from gspo_lightning.program.commands import {0}\n{0}()"


@pytest.mark.parametrize(
    "begin",
    [
        *(f"runpy.run_path({name!r}, run_name='__main__')" for name in ("train.py", "evaluate.py")),
        *(COMMAND.format(name) for name in ("train", "evaluate")),
    ],
)
def test_while_libraries_are_imported(begin):
    """Pressed where torch would be imported, so that nothing of it is."""
    for rank, argument, lines in (("0", "a=1", 1), ("1", "a=1", 0), ("0", "traceback=true", 9)):
        done = subprocess.run(
            [sys.executable, "-c", AT_IMPORT + begin, argument], cwd=Path(__file__).parents[2], text=True,
            capture_output=True, env={**os.environ, "LOCAL_RANK": rank}, timeout=240,
        )  # fmt: skip
        said = done.stderr.splitlines()
        assert done.returncode == 130 and done.stdout == ""
        assert said[-1:] == ["error: SIGINT: stopped"][:lines]
        assert len(said) >= lines if lines > 1 else len(said) == lines


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_of_the_ranks_that_a_launcher_has_started_says_so(variable, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(SystemExit) as end:
            cli.run(interrupt)
        assert end.value.code == 130
        said.append(capsys.readouterr().err)
    assert said == ["error: SIGINT: stopped\n", ""]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_script_that_is_imported_leaves_ctrl_c_alone(script):
    """As a process does that multiprocessing spawns."""
    code = f"{AT_IMPORT}runpy.run_path({script!r}, run_name='__mp_main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True, capture_output=True, timeout=240
    )
    assert done.returncode == -signal.SIGINT and done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_command_that_ignores_ctrl_c_still_does_and_ours_is_taken_back(monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt_module.end_at_interrupt()
    interrupt_module.raise_at_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt_module.end_at_interrupt()
    assert signal.getsignal(signal.SIGINT) is interrupt_module._end
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli.run(lambda: None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_while_the_model_loads(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(PolicyLoader, "load", interrupt)
    folder = f"hydra.run.dir={tmp_path}/run"
    assert ended(monkeypatch, capfd, folder) == ["error: SIGINT: stopped; no checkpoint has been written yet"]
    assert ended(monkeypatch, capfd, folder, main=cli.evaluate_main) == ["error: SIGINT: stopped"]


def test_while_the_data_loads_nothing_is_left_and_a_traceback_is_shown_on_request(tmp_path, monkeypatch, capfd):
    folder = f"hydra.run.dir={tmp_path}/run"
    monkeypatch.setattr(PromptDataModule, "check", interrupt)
    assert ended(monkeypatch, capfd, folder) == ["error: SIGINT: stopped"]
    assert not (tmp_path / "run").exists(), "a run that did nothing left a folder"
    shown = ended(monkeypatch, capfd, folder, "traceback=true")
    assert shown[0].startswith("Traceback") and shown[-1] == "error: SIGINT: stopped"


def test_while_the_model_is_exported(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(training_run, "export_policy", interrupt)
    lines = ended(monkeypatch, capfd, f"hydra.run.dir={tmp_path}")
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert lines == [f"error: SIGINT: stopped; resume with ckpt_path={last}"] and last.exists()
    assert not (tmp_path / "model").exists() and not (tmp_path / ".model.tmp").exists()


def test_it_ends_a_sweep(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(PolicyLoader, "load", interrupt)
    lines = ended(monkeypatch, capfd, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    assert lines == ["error: SIGINT: stopped; no checkpoint has been written yet; the jobs after it were not run"]
    assert not (tmp_path / "1").exists()
