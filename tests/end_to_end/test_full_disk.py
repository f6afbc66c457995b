"""A disk that fills up while a run saves: the checkpoint before stands, one line says so, and the run goes on from it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from gspo_lightning.callbacks.checkpoint_files import atomic_checkpoint
from gspo_lightning.callbacks.disk_errors import disk_error
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.program import training_run
from gspo_lightning.program.resume import is_whole
from tests.command_line import SHORT, metrics, run
from tests.conf import test_every_key as in_process


class Trainer(SimpleNamespace):
    """Saves 1, then fails half-way through the file."""

    is_global_zero, strategy = True, SimpleNamespace(barrier=lambda name: None)
    saved = 0

    def save_checkpoint(self, path):
        if self.saved:
            Path(path).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        torch.save({"rollout": 1}, path)
        self.saved += 1


def test_what_was_half_written_is_gone_and_the_one_before_stands(tmp_path):
    trainer, last = Trainer(), tmp_path / "checkpoints" / "last.ckpt"
    atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
    with pytest.raises(
        UserError,
        match=r"cannot write .*No space left on device\); free some space and resume with ckpt_path=.*last.ckpt",
    ):
        atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
    assert torch.load(last, weights_only=True) == {"rollout": 1}
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_tells_at_the_flush_that_it_is_full_keeps_nothing_of_the_checkpoint(tmp_path, monkeypatch):
    """NFS and quotas do."""

    def save(path):
        torch.save({"rollout": 2}, path)
        monkeypatch.setattr(os, "fsync", fail)

    def fail(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    trainer, last = Trainer(), tmp_path / "last.ckpt"
    atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
    trainer.save_checkpoint = save
    with pytest.raises(UserError) as error:
        atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
    assert (
        str(error.value)
        == f"cannot write {last} (Disk quota exceeded); free some space and resume with ckpt_path={last}"
    )
    assert torch.load(last, weights_only=True) == {"rollout": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "make it writable"), (errno.EIO, "look after the disk"), (errno.ENOSPC, "free some space")],
)
@pytest.mark.parametrize("left", ["last.ckpt", "previous.ckpt"])
def test_the_remedy_is_that_of_the_error(number, remedy, left, tmp_path):
    """Without hard links only the checkpoint before may be there; resuming from last.ckpt finds it."""
    last = tmp_path / "last.ckpt"
    (tmp_path / left).touch()
    line = f"cannot write {last} ({os.strerror(number)}); {remedy} and resume with ckpt_path={last}"
    assert str(disk_error(last, OSError(number, os.strerror(number)))) == line


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_where_ranks_write_together_all_have_the_line_and_rank_0_clears_up(tmp_path, monkeypatch):
    """What torch raises there is no `Exception`."""
    trainer, last = Trainer(), tmp_path / "last.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            distributed_checkpoint.save({"weight": torch.zeros(10)}, checkpoint_id=path, no_dist=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer.save_checkpoint = save
    for is_first, left in ((False, [".last.ckpt.tmp"]), (True, [])):
        monkeypatch.setattr(Trainer, "is_global_zero", is_first)
        # torch tells a full disk in one way or another, as its buffers happen to be.
        line = rf"^cannot write {last} \((File too large|\d+ MiB are free)\); nothing has been saved yet$"
        with pytest.raises(UserError, match=line) as error:
            atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
        assert isinstance(error.value.__cause__, CheckpointException)
        assert [path.name for path in tmp_path.iterdir()] == left


def test_what_one_of_several_ranks_meets_is_the_error_of_all(tmp_path):
    def raised(*failures):
        def save(path):
            raise CheckpointException("save", {rank: (error, None) for rank, error in failures})

        trainer = Trainer()
        trainer.save_checkpoint = save
        with pytest.raises((UserError, ValueError)) as error:
            atomic_checkpoint(trainer, tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
        return f"{error.type.__name__}: {error.value}"

    other, full = ValueError("of rank 0"), OSError(errno.EDQUOT, "Disk quota exceeded")
    assert raised((1, KeyError("of rank 1")), (0, other)) == "ValueError: of rank 0"
    expected = f"UserError: cannot write {tmp_path}/last.ckpt (Disk quota exceeded); nothing has been saved yet"
    assert raised((0, other), (3, full)) == expected


def test_other_errors_are_not_the_disks(tmp_path):
    assert disk_error(tmp_path, RuntimeError("shapes")) is None
    assert disk_error(tmp_path, OSError(errno.ENOENT, "no such file")) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_disk_that_is_full_at_the_export_is_one_line_and_the_model_before_stands(tmp_path, monkeypatch):
    """safetensors has an error of its own, which is no OSError."""
    in_process.run(tmp_path, "max_rollouts=1", "logger=none")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    export, limits = training_run.export_policy, resource.getrlimit(resource.RLIMIT_FSIZE)

    def to_a_full_disk(*arguments, **settings):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            export(*arguments, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(training_run, "export_policy", to_a_full_disk)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError) as error:
        in_process.run(tmp_path, "max_rollouts=2", "logger=none", "ckpt_path=auto")
    assert str(error.value) == (
        f"cannot write {tmp_path} (File too large); free some space and resume with ckpt_path={last}"
    )
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_disk_that_is_full_at_the_first_validation_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.csv"))

    monkeypatch.setattr(GSPOModule, "validation_step", fail)
    with pytest.raises(UserError) as error:
        in_process.run(tmp_path, "logger=none")
    assert (
        str(error.value) == f"cannot write {tmp_path}/metrics.csv (No space left on device); nothing has been saved yet"
    )


@pytest.fixture()
def small_disk(tmp_path):
    """A file system in memory whose size can be changed; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def test_a_full_disk_stops_the_run_with_one_line_and_room_lets_it_go_on_bit_identically(small_disk, tmp_path):
    options = ["checkpoint.every_n_rollouts=2", "export.enabled=false"]
    run(*SHORT, *options, f"hydra.run.dir={tmp_path / 'whole'}")
    size = (tmp_path / "whole" / "checkpoints" / "last.ckpt").stat().st_size
    resize(small_disk, f"{int(2.5 * size) // 1024 + 64}k")
    place = small_disk / "run"
    done = run(*SHORT, *options, f"hydra.run.dir={place}", expect=2)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "cannot write" in line and f"resume with ckpt_path={place}/checkpoints/last.ckpt" in line
    assert is_whole(place / "checkpoints" / "last.ckpt")
    assert not any(name.endswith(".tmp") for _, _, names in os.walk(place) for name in names)
    resize(small_disk, "64m")
    run(*SHORT, *options, f"hydra.run.dir={place}", f"ckpt_path={place}/checkpoints/last.ckpt")
    assert metrics(place) == metrics(tmp_path / "whole")
    last, whole = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in (place, tmp_path / "whole")
    )
    assert all(torch.equal(last[name], whole[name]) for name in whole) and last.keys() == whole.keys()
