"""`python train.py -m`: every job runs, failures have their line and the exit code, a signal ends the sweep."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from gspo_lightning.callbacks.detect_anomaly import NonFiniteLayerError
from gspo_lightning.errors import UserError
from gspo_lightning.program import ending
from gspo_lightning.report.compare import main as compare
from gspo_lightning.report.runs import find_runs
from gspo_lightning.rollout import EngineUnavailableError
from tests.command_line import run, start
from tests.support import has_module

ROOT = Path(__file__).parents[2]
MICRO = ["experiment=micro", "export.enabled=false"]


def sweep(*arguments, cwd=ROOT):
    return run("-m", *MICRO, *arguments, cwd=cwd, expect=None, timeout=200)


def test_a_failing_job_has_its_line_and_the_others_run_and_can_be_compared(tmp_path, capsys):
    done = sweep("max_rollouts=2", "objective=gspo,grpo", "update.num_minibatches=3,2", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: job ")]
    assert len(errors) == 1 and errors[0].startswith("error: job 0 (")
    assert [line.split()[2] for line in failed] == ["0", "2"]
    assert all("data.prompts_per_rollout=8 must be divisible by update.num_minibatches=3" in line for line in failed)
    runs, without = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["1", "3"]
    assert [folder.name for folder in without] == ["0", "2"]
    assert compare([str(tmp_path)]) == 0
    assert "importance_sampling_level=token" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(("flag", "place"), [("-m", 1), ("--multirun", 2)])
def test_the_flag_may_stand_anywhere_among_the_overrides(flag, place, tmp_path, monkeypatch):
    arguments = ["experiment=micro", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    arguments.insert(place, flag)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    seeds = []
    main = hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")
    ending.run(main(lambda cfg: seeds.append(cfg.seed)))
    GlobalHydra.instance().clear()
    assert seeds == [1, 2]


def test_a_sweep_that_cannot_write_says_so_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = sweep("seed=1,2", f"hydra.sweep.dir={tmp_path / 'file' / 'sweep'}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: hydra.sweep.dir={tmp_path}/file/sweep: cannot write there (Not a directory); choose another folder\n"
    )


def test_a_job_does_not_take_the_place_of_another_of_its_sweep(tmp_path):
    done = sweep(
        "max_rollouts=1", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${objective.loss_type}"
    )  # fmt: skip
    assert done.returncode == 2
    line = "hydra.sweep.subdir=grpo: job 0 of this sweep has that folder already; give each job its own, such as the default "
    failed = [text for text in done.stderr.splitlines() if text.startswith("failed: job ")]
    assert len(failed) == 2 and all(line in text for text in failed) and "Traceback" not in done.stderr
    (left,), _ = find_runs([tmp_path])
    assert left.settings["seed"] == 1 and left.summary and not list(tmp_path.rglob("*.old"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a mistake"), 2),
        (NonFiniteLayerError("not a number"), 3),
        (EngineUnavailableError("no server left"), 4),
        (ValueError("a fault of ours"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_job_of_a_sweep_ends_it_with_the_code_of_a_single_run(error, code, monkeypatch, tmp_path, capsys):
    job = SimpleNamespace(num=1, override_dirname="seed=2")
    hydra = SimpleNamespace(mode=RunMode.MULTIRUN, job=job, runtime=SimpleNamespace(output_dir=str(tmp_path)))
    monkeypatch.setattr(ending.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(ending, "_check_job", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(ending.first_error, "_rank", None)  # whatever an earlier test of this process was

    def work(cfg):
        raise error

    with pytest.raises(ValueError if code is None else SystemExit) as ended:
        ending.run(lambda: ending.one_job(work, OmegaConf.create()))
    if code is not None:
        assert ended.value.code == code
        assert capsys.readouterr().err.splitlines()[0] == f"failed: job 1 (seed=2): {error}"


INSTALL = (
    "run pip install hydra-optuna-sweeper==1.3.0 SQLAlchemy==1.4.54 alembic==1.13.3 hydra-joblib-launcher==1.2.0 "
    "hydra-submitit-launcher==1.2.0"
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "In 'hydra/launcher/two_processes': Could not load 'hydra/launcher/joblib'. Available options: basic",
            f"error: hydra/launcher/joblib is not installed; {INSTALL}",
        ),
        (
            "In 'train': Could not find 'hydra/sweeper/optuna' Available options in 'hydra/sweeper': basic",
            f"error: hydra/sweeper/optuna is not installed; {INSTALL}",
        ),
        ("In 'train': Could not find 'hydra/sweeper/other'", "error: In 'train': Could not find 'hydra/sweeper/other'"),
    ],
)
def test_what_the_extra_for_sweeps_brings_is_said_to_be_in_it(said, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        raise HydraException(said)

    with pytest.raises(SystemExit):
        ending.run(main)
    assert capsys.readouterr().err == told + "\n"


@pytest.mark.parametrize("trainer", [[], ["trainer=ddp", "trainer.devices=1"]], ids=["here", "in a program of its own"])
def test_a_signal_ends_the_sweep_behind_the_job_in_hand(trainer, tmp_path):
    settings = [*MICRO, *trainer, "trainer.accelerator=cpu", "max_rollouts=1000", "seed=1,2"]
    process, written = start("-m", *settings, f"hydra.sweep.dir={tmp_path}")
    with written:
        for line in written:
            if line.startswith("rollout 2/"):
                process.send_signal(signal.SIGTERM)
                break
        told = written.read()
    assert process.wait(240) == 130, told
    assert "the jobs after it were not run" in told and "Traceback" not in told
    assert (tmp_path / "0" / "checkpoints" / "last.ckpt").exists() and not (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_module("hydra_plugins.hydra_optuna_sweeper"), reason="needs the extra `sweep`")
def test_the_search_keeps_its_trials_and_adds_to_them(tmp_path):
    import optuna

    for _ in range(2):
        done = sweep("hparams_search=clip_optuna", "max_rollouts=2", "hydra.sweeper.n_trials=2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    trials = optuna.load_study(study_name="clip_optuna", storage=f"sqlite:///{tmp_path / 'clip_optuna.db'}").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert len({str(trial.params) for trial in trials}) == 4, "a trial was drawn twice"
    summaries = sorted(tmp_path.glob("multirun/*/*/*/summary.json"), key=os.path.getmtime)
    assert [json.loads(path.read_text())["val_sampled_after"] for path in summaries] == [t.value for t in trials]
