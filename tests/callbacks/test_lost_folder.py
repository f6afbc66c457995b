"""A run whose folder is moved, removed or closed to it while it writes ends in one line that says what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.callbacks.checkpoint_files import atomic_checkpoint
from gspo_lightning.callbacks.disk_errors import disk_error
from gspo_lightning.errors import UserError
from tests.callbacks.fakes import TRAINER, FakeModule, start


def gone(folder):
    return (
        f"{folder} is gone: it was moved or removed while the run wrote to it; where the run's folder is now, its newest "
        "checkpoint is checkpoints/last.ckpt: resume with hydra.run.dir=<that folder> ckpt_path=auto"
    )


@pytest.mark.parametrize("lost", ["run", "run/checkpoints"])
def test_a_folder_that_goes_while_a_checkpoint_is_written_is_named(lost, tmp_path):
    """What torch's own writer raises then is a RuntimeError."""

    def save(path):
        shutil.rmtree(tmp_path / lost)
        torch.save({"weight": torch.zeros(3)}, path)

    strategy = SimpleNamespace(barrier=lambda name: None)
    trainer = SimpleNamespace(is_global_zero=True, strategy=strategy, save_checkpoint=save)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError) as error:
        atomic_checkpoint(trainer, last, last.with_name("previous.ckpt"))
    assert str(error.value) == gone(tmp_path / lost)


def test_a_folder_that_goes_between_two_rollouts_is_named(tmp_path):
    recorder = start(tmp_path / "run")
    recorder.on_train_start(TRAINER, FakeModule())
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError) as error:
        recorder.on_train_batch_end(TRAINER, FakeModule().at(1), None, None, 0)
    assert str(disk_error(tmp_path / "run", error.value)) == gone(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("copied", [False, True])
def test_a_folder_that_took_the_place_of_the_runs_is_not_written_to(copied, tmp_path):
    """A run that went on would have half of its records here and half there."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    recorder = start(folder)
    recorder.on_train_start(TRAINER, FakeModule())
    recorder.on_train_batch_end(TRAINER, FakeModule().at(1), None, None, 0)
    folder.rename(moved)
    shutil.copytree(moved, folder) if copied else folder.mkdir()
    then = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = (
        f"{folder} is not the folder that this run wrote to any more: that one was moved or removed; where the run's "
        "folder is now, its newest checkpoint is checkpoints/last.ckpt: resume with hydra.run.dir=<that folder> "
        "ckpt_path=auto"
    )
    for write in (
        lambda: recorder.on_train_batch_end(TRAINER, FakeModule().at(2), None, None, 1),
        lambda: recorder.on_validation_end(TRAINER, FakeModule().at(1)),
        recorder.state_dict,
        recorder.check_folder,
    ):
        with pytest.raises(UserError) as error:
            write()
        assert str(error.value) == line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == then
    folder.rename(tmp_path / "other")
    moved.rename(folder)
    recorder.on_train_batch_end(TRAINER, FakeModule().at(2), None, None, 1)  # the same folder under its name again
    assert recorder.table.rows == 3


def test_a_folder_behind_a_link_at_its_old_path_is_the_same(tmp_path):
    recorder = start(tmp_path / "run")
    recorder.on_train_start(TRAINER, FakeModule())
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").symlink_to(tmp_path / "moved")
    recorder.on_train_batch_end(TRAINER, FakeModule().at(1), None, None, 0)
    assert recorder.table.rows == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ESTALE])
def test_files_of_the_run_that_are_closed_to_it_are_named_and_others_are_not_its_own(number, tmp_path):
    table, last = tmp_path / "metrics.csv", tmp_path / "checkpoints" / "last.ckpt"
    reason = os.strerror(number)
    error = OSError(number, reason, str(table))
    assert str(disk_error(tmp_path, error)) == f"cannot write {table} ({reason}); nothing has been saved yet"
    last.parent.mkdir()
    last.touch()
    remedy = f"make it writable and resume with ckpt_path={last}"
    assert str(disk_error(tmp_path, error)) == f"cannot write {table} ({reason}); {remedy}"
    temporary = last.with_name(".last.ckpt.tmp")
    by_torch = RuntimeError(f"File {temporary} cannot be opened.")
    assert str(disk_error(last, by_torch)) == f"cannot write {temporary} (it cannot be opened); {remedy}"
    for other in (tmp_path.parent / "data.json", Path("data.json")):  # of a reward function, say
        assert disk_error(tmp_path, OSError(number, reason, str(other))) is None
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "data.json"))
    assert disk_error(tmp_path, missing) is None


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTDIR, errno.EISDIR])
def test_a_file_in_the_place_of_a_folder_of_the_run_is_named_and_others_are_not_its_own(number, tmp_path):
    folder, last = tmp_path / "summary", tmp_path / "checkpoints" / "last.ckpt"
    reason = os.strerror(number)
    error = OSError(number, reason, str(folder))
    assert str(disk_error(tmp_path, error)) == f"cannot write {folder} ({reason}); nothing has been saved yet"
    last.parent.mkdir()
    last.touch()
    remedy = f"move away what is there and resume with ckpt_path={last}"
    assert str(disk_error(tmp_path, error)) == f"cannot write {folder} ({reason}); {remedy}"
    assert disk_error(tmp_path, OSError(number, reason, str(tmp_path.parent / "data.json"))) is None
