"""Ctrl-C where no rollout is in hand: one line, exit code 130, nothing half-written."""

from __future__ import annotations

import signal
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning import cli
from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.policy.load import PolicyLoader
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
