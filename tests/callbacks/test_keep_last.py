"""``checkpoint.keep_last``: numbered checkpoints are second names of what was saved, and old ones go."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.callbacks.checkpoint_files import keep_numbered


@pytest.fixture(params=["file", "folder"])
def save(request, tmp_path):
    """Writes the checkpoint of a rollout as one file, or as the folder of several ranks."""

    def write(number):
        path = tmp_path / "last.ckpt"
        if request.param == "file":
            fresh = tmp_path / "fresh"
            fresh.write_text(str(number))
            fresh.replace(path)
        else:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir()
            (path / "rank0").write_text(str(number))
        return path

    return write


def content(path):
    return (path / "rank0" if path.is_dir() else path).read_text()


def numbered(folder):
    return {path.name: content(path) for path in sorted(folder.glob("rollout-*.ckpt"))}


def test_the_newest_stay(save, tmp_path):
    for number in (5, 10, 15, 20):
        path = save(number)
        keep_numbered(path, number, keep_last=2)
    assert numbered(tmp_path) == {"rollout-000015.ckpt": "15", "rollout-000020.ckpt": "20"}


def test_they_are_told_by_their_numbers_and_other_files_stay(save, tmp_path):
    (tmp_path / "rollout-000002-mine.ckpt").write_text("a copy that somebody has made")
    for number in (999_998, 999_999, 1_000_000, 1_000_001):
        keep_numbered(save(number), number, keep_last=2)
    (tmp_path / "rollout-000002-mine.ckpt").unlink()
    assert numbered(tmp_path) == {"rollout-1000000.ckpt": "1000000", "rollout-1000001.ckpt": "1000001"}


def test_a_run_that_went_back_replaces_what_came_later(save, tmp_path):
    for number in (5, 10, 15):
        keep_numbered(save(number), number, keep_last=3)
    keep_numbered(save(10), 10, keep_last=3)
    assert numbered(tmp_path) == {"rollout-000005.ckpt": "5", "rollout-000010.ckpt": "10"}


def test_nothing_is_copied(save, tmp_path):
    path = save(5)
    keep_numbered(path, 5, keep_last=1)
    saved, second = path, tmp_path / "rollout-000005.ckpt"
    if saved.is_dir():
        saved, second = saved / "rank0", second / "rank0"
    assert saved.stat().st_ino == second.stat().st_ino


def test_where_a_file_cannot_have_two_names_it_is_copied(save, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # exFAT, and many network and FUSE mounts

    monkeypatch.setattr(os, "link", refuse)
    for number in (5, 10, 15):
        keep_numbered(save(number), number, keep_last=2)
    assert numbered(tmp_path) == {"rollout-000010.ckpt": "10", "rollout-000015.ckpt": "15"}
    assert content(tmp_path / "last.ckpt") == "15"


@pytest.mark.parametrize("first_rank", [True, False])
@pytest.mark.parametrize("resumed_from", ["last.ckpt", "previous.ckpt", None])
def test_a_kill_before_the_second_name_does_not_cost_the_number(save, resumed_from, first_rank, tmp_path):
    """Rollout 6 is the last one: no later checkpoint would make up for it."""
    for number in (2, 4):
        keep_numbered(save(number), number, keep_last=2)
    save(6)
    callback = RolloutCheckpoint(tmp_path, 2, keep_last=2)
    trainer = SimpleNamespace(
        callbacks=[callback], limit_val_batches=0, fast_dev_run=False, is_global_zero=first_rank,
        ckpt_path=None if resumed_from is None else str(tmp_path / resumed_from),
    )  # fmt: skip
    before = numbered(tmp_path)
    callback.on_train_start(trainer, SimpleNamespace(rollouts_done=6))
    expected = {"rollout-000004.ckpt": "4", "rollout-000006.ckpt": "6"}
    assert numbered(tmp_path) == (expected if resumed_from == "last.ckpt" and first_rank else before)
    assert not list(tmp_path.glob(".*"))


def test_a_copy_that_does_not_fit_leaves_no_part_of_a_checkpoint(save, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    def fill(source, target, **_):
        with open(target, "w") as file:
            file.write("1")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    path = save(10)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(OSError):
        keep_numbered(path, 10, keep_last=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
