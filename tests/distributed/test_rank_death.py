"""One of two ranks fails or is killed: the other ends within seconds, and the last line is the first error."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from gspo_lightning.distributed import first_error
from gspo_lightning.errors import UserError
from gspo_lightning.program import ending

ROOT = Path(__file__).parents[2]
REWARDS = """
import os, signal, time
def f(completions, **_):
    if os.environ.get("LOCAL_RANK", "0") == os.environ["DIES"]:
        if "kill" in os.environ["HOW"]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("on purpose")
    if "wait" in os.environ["HOW"]:
        time.sleep(120)  # no collective that gloo would end
    return [0.0, 1.0] * (len(completions) // 2)
"""
RAISED = "reward function letter_share raised ZeroDivisionError: on purpose (row micro_letters:"


@pytest.mark.parametrize(
    ("script", "how", "rank", "code", "last"),
    [
        pytest.param("train.py", "raise", "1", 2, f"error: rank 1: {RAISED}", marks=pytest.mark.slow),
        ("evaluate.py", "raise", "0", 2, f"error: rank 0: {RAISED}"),
        pytest.param("train.py", "kill", "1", -9, "[rank: 1] Child process with PID", marks=pytest.mark.slow),
        pytest.param("train.py", "raise, wait", "0", 2, f"error: rank 0: {RAISED}", marks=pytest.mark.slow),
        pytest.param("train.py", "raise, wait", "1", 2, f"error: rank 1: {RAISED}", marks=pytest.mark.slow),
        ("train.py", "kill, wait", "0", -9, f"error: {first_error.DIED}; no checkpoint has been written yet"),
    ],
)
def test_the_others_end_too_and_the_first_error_is_the_last_line(script, how, rank, code, last, tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    command = [
        sys.executable, str(ROOT / script), "experiment=micro", "trainer=ddp", "trainer.accelerator=cpu", "print_config=false",
        "hydra.run.dir=run", "reward.functions.letter_share.function.path=my_rewards.f",
    ]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    environment = {
        **os.environ, "DIES": rank, "HOW": how, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # Start-up on a busy machine included: nobody waits for the rank that has gone, which gloo does for half an hour.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.strip().splitlines()[-1].startswith(last), done.stderr
    told = {"raise": 2, "raise, wait": 2, "kill": 0, "kill, wait": 1}[how]
    assert len(errors) == told and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run").exists() == ("kill" in how), "a run that has done nothing leaves no folder"


@pytest.fixture()
def ranks(tmp_path, monkeypatch):
    """The folder of a run, that of temporary files, and what makes this process a rank of the run."""
    places = {name: tmp_path / name for name in ("run", "temporary")}
    for place in places.values():
        place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places["temporary"]))
    yield SimpleNamespace(**places, join=functools.partial(first_error.join, places["run"]))
    first_error.join(places["run"], 0, 1)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_error_is_kept_and_silence_is_said(ranks):
    last = ranks.run / "checkpoints" / "last.ckpt"
    died = (
        "another rank died without an error message (killed, out of memory, or on a GPU after waiting for the others "
        "longer than trainer.strategy.timeout?)"
    )
    ranks.join(1, 4)
    assert first_error.first(ranks.run, wait_s=0.1) == (died, 1)
    ranks.join(1, 4, last)
    assert first_error.first(ranks.run, wait_s=0.1) == (f"{died}; no checkpoint has been written yet", 1)
    last.parent.mkdir()
    for name in ("previous.ckpt", "last.ckpt"):  # the one before will do
        (last.parent / name).touch()
        assert first_error.first(ranks.run, wait_s=0.1) == (f"{died}; resume with ckpt_path={last}", 1)
        (last.parent / name).unlink()
    ranks.join(3, 4)
    assert first_error.record(ranks.run, "the cause (row mine:train:1)", 4)
    assert not first_error.record(ranks.run, "the cause (row mine:train:7)", 4), "one rank says what all have met"
    assert first_error.record(ranks.run, "a consequence", 2)
    assert first_error.first(ranks.run) == ("rank 3: the cause (row mine:train:1)", 4)
    assert (left(ranks.run), left(ranks.temporary)) == ([first_error.NAME, "checkpoints"], [])
    ranks.join(0, 1)
    assert not first_error.several_ranks() and left(ranks.run) == ["checkpoints"]


def test_a_full_disk_is_told_by_way_of_the_temporary_files(ranks, monkeypatch):
    opened = os.open

    def full(path, *arguments):
        descriptor = opened(path, *arguments)
        if Path(path).parent in full_disks:
            os.close(descriptor)
            return opened("/dev/full", os.O_WRONLY)
        return descriptor

    monkeypatch.setattr(first_error.os, "open", full)
    full_disks = [ranks.run]
    ranks.join(0, 2)
    assert first_error.record(ranks.run, "cannot write", 2)
    assert left(ranks.run) == [] and len(left(ranks.temporary)) == 1
    assert first_error.first(ranks.run) == ("rank 0: cannot write", 2)
    assert not first_error.record(ranks.run, "cannot write", 2)
    (note,) = ranks.temporary.iterdir()
    other = ranks.temporary / note.name.replace(note.name[15:31], "0" * 16)
    other.touch()
    ranks.join(0, 2)
    assert left(ranks.temporary) == [other.name], "the note of a run that may still end"
    os.utime(other, (0, 0))
    ranks.join(0, 2)
    assert left(ranks.temporary) == [], "nobody asks for it any more"
    full_disks.append(ranks.temporary)
    assert first_error.record(ranks.run, "cannot write", 2), "nowhere to note it: the screen has it"
    assert (left(ranks.run), left(ranks.temporary)) == ([], [])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_what_all_ranks_are_refused_for_is_said_once_and_leaves_no_folder(order, ranks, monkeypatch, capsys):
    hydra = SimpleNamespace(mode=RunMode.RUN, runtime=SimpleNamespace(output_dir=str(ranks.run)))
    monkeypatch.setattr(ending.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(ending, "_check_job", lambda: None)

    def refuse(cfg):
        raise UserError("optimizer.lr=-1\nmust be above 0")

    (ranks.run / "config.yaml").touch()
    for rank in order:
        ranks.join(1, 3)  # not as rank 0, which begins before the others fail
        monkeypatch.setattr(first_error, "_rank", rank)
        with pytest.raises(SystemExit) as ended:
            ending.one_job(refuse, OmegaConf.create({"traceback": False}))
        assert ended.value.code == 2
        assert first_error.first(ranks.run) == (f"rank {order[0]}: optimizer.lr=-1 must be above 0", 2)
    assert capsys.readouterr().err == "error: optimizer.lr=-1 must be above 0\n"
    assert not ranks.run.exists()


def test_only_the_loss_of_a_rank_is_taken_for_one():
    assert first_error.lost_a_rank(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not first_error.lost_a_rank(RuntimeError("shapes cannot be multiplied"))
    assert not first_error.lost_a_rank(ValueError("Connection closed by peer"))
