"""Jobs of a sweep with several ranks: each is a program of its own, and the others know nothing of its failures."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from gspo_lightning.distributed import rendezvous
from gspo_lightning.errors import UserError
from gspo_lightning.program import sweep_job
from gspo_lightning.program.sweep_job import begins_ranks, command
from tests.command_line import run

REWARDS = """
import os
import sys
from pathlib import Path

def fine(completions, **_):
    print("\\r1/2\\r2/2", end="", file=sys.stderr, flush=True)
    Path(f"scored_by_{os.environ['LOCAL_RANK']}").touch()
    return [float("a" in str(completion)) for completion in completions]

def fails(completions, **_):
    return [1 / int(os.environ["LOCAL_RANK"] == "0")] * len(completions)
"""


@pytest.mark.slow
def test_a_job_that_fails_on_one_rank_ends_and_the_next_one_trains_on_both(tmp_path):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    function = "reward.functions.letter_share.function.path=own_rewards.fails,own_rewards.fine"
    done = run(
        "-m", "experiment=micro", "export.enabled=false", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "max_rollouts=2", "print_config=false", function, "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=job ${hydra.job.num}", cwd=tmp_path, expect=2,
    )  # fmt: skip
    said = done.stderr
    reason = "rank 1: reward function letter_share raised ZeroDivisionError: division by zero"
    failed = [line for line in said.splitlines() if line.startswith("failed: job ")]
    errors = [line for line in said.splitlines() if line.startswith("error: job 0 ")]
    assert "Traceback" not in said
    assert "\r1/2\r2/2" in said, "a progress bar goes back to the beginning of its line"
    assert len(failed) == len(errors) == 1 and failed[0].startswith("failed: job 0 (")
    assert reason in failed[0] and reason in errors[0]
    assert {path.name for path in tmp_path.glob("scored_by_*")} == {"scored_by_0", "scored_by_1"}
    assert not (tmp_path / "sweep" / "job 0" / "summary.json").exists()
    assert json.loads((tmp_path / "sweep" / "job 1" / "summary.json").read_text())["steps"] == 2


def job(tmp_path, mode=RunMode.MULTIRUN, launcher="hydra._internal.core_plugins.basic_launcher.BasicLauncher"):
    source = SimpleNamespace
    return SimpleNamespace(
        mode=mode,
        launcher={"_target_": launcher},
        job=SimpleNamespace(num=3, config_name="mine"),
        overrides=OmegaConf.create(
            {
                "hydra": ["hydra.sweep.dir=out", "hydra.mode=MULTIRUN", "hydra.job.env_set.A=1"],
                "task": ["seed=${max_rollouts}", "+a='b c'"],
            }
        ),
        runtime=SimpleNamespace(
            cwd="/where/it/began",
            output_dir=str(tmp_path / "o'ut"),
            config_sources=[
                source(path="hydra.conf", schema="pkg", provider="hydra"),
                source(path="gspo_lightning.conf", schema="pkg", provider="main"),
                source(path="/my/conf", schema="file", provider="command-line"),
                source(path="", schema="structured", provider="schema"),
            ],
        ),
    )


def test_the_command_of_a_job_is_that_of_a_single_run_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my/train.py", "-m", "seed=1,2"])
    monkeypatch.chdir(tmp_path)  # as with hydra.job.chdir=true
    assert command(job(tmp_path)) == [
        sys.executable, "/where/it/began/my/train.py",
        "--config-name", "mine", "--config-path", "pkg://gspo_lightning.conf", "--config-dir", "/my/conf",
        "seed=${max_rollouts}", "+a='b c'", "hydra.sweep.dir=out", "hydra.job.env_set.A=1",
        f"hydra.run.dir='{tmp_path}/o\\'ut'", "hydra.job.num=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "strategy", "ranks", "slurm", "apart"),
    [
        (RunMode.RUN, "ddp", 2, False, False),
        (RunMode.MULTIRUN, "auto", 1, False, False),
        (RunMode.MULTIRUN, "auto", 2, False, True),
        (RunMode.MULTIRUN, {"_target_": "DDPStrategy"}, 1, False, True),  # its process group would stay
        (RunMode.MULTIRUN, {"_target_": "DDPStrategy"}, 1, True, False),
    ],
)
def test_lightning_starts_ranks_in_programs_of_their_own(mode, strategy, ranks, slurm, apart, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: job(tmp_path, mode))
    monkeypatch.setattr(rendezvous.SLURMEnvironment, "detect", lambda: slurm)
    assert begins_ranks({"strategy": strategy}, ranks) is apart


def test_a_sweep_that_is_a_rank_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_job, "_IS_RANK", True)
    submitit = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: job(tmp_path, launcher=submitit))
    assert not begins_ranks({"strategy": "auto"}, 2)
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: job(tmp_path))
    with pytest.raises(UserError, match="hydra.mode=MULTIRUN: every rank that srun or torchrun has started would run"):
        begins_ranks({"strategy": "auto"}, 2)


def test_a_launcher_whose_program_is_not_ours_must_start_ranks_itself(tmp_path, monkeypatch):
    submitit = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: job(tmp_path, launcher=submitit))
    with pytest.raises(UserError, match="hydra/launcher: LocalLauncher must itself start the 2 ranks of a job"):
        begins_ranks({"strategy": "auto"}, 2)
