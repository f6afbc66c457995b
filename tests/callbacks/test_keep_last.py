"""``checkpoint.keep_last``: numbered checkpoints are second names of what was saved, and old ones go."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from gspo_lightning.callbacks.checkpoint import keep_numbered


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
