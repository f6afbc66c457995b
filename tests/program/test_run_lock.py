"""Two runs in one folder: the second is refused, and a killed run can be resumed at once."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.program import run_lock
from gspo_lightning.program.run_lock import RunLock
from tests.command_line import run as command
from tests.command_line import start
from tests.conf.test_every_key import run


@contextlib.contextmanager
def held_by_another_process(folder):
    """A process that holds the lock and has a child of its own, which outlives it; yields it."""
    folder.mkdir(exist_ok=True)
    holder, written = start(folder, script="tests/program/run_holding.py")
    with written:
        worker = int(written.readline())
        try:
            yield holder
        finally:
            holder.send_signal(signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)
            holder.wait(60)


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
    with held_by_another_process(tmp_path):
        (tmp_path / "metrics.csv").write_text("of the first")
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(UserError) as error:
            run(tmp_path, "logger=none")
        assert str(error.value) == (
            f"hydra.run.dir={tmp_path}: another run is writing there; wait until it ends or choose another folder"
        )
        assert {path.name for path in tmp_path.iterdir()} == before
        assert (tmp_path / "metrics.csv").read_text() == "of the first"


def test_a_second_evaluation_is_refused_and_leaves_the_files_of_the_first(tmp_path):
    """Two that start in the same second have one folder by default."""
    with held_by_another_process(tmp_path):
        (tmp_path / "held_out.jsonl").write_text("of the first")
        done = command("experiment=micro", f"hydra.run.dir={tmp_path}", script="evaluate.py", expect=2)
        assert done.stderr == (
            f"error: hydra.run.dir={tmp_path}: another run is writing there; wait until it ends or choose another folder\n"
        )
        assert (tmp_path / "held_out.jsonl").read_text() == "of the first" and not (
            tmp_path / "evaluation.json"
        ).exists()
    command("experiment=micro", f"hydra.run.dir={tmp_path}", script="evaluate.py")
    assert {path.name for path in tmp_path.iterdir()} == {"held_out.jsonl", "evaluation.json"}


def test_a_killed_run_can_be_resumed_at_once_though_a_child_of_it_lives_on(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        lock = RunLock(tmp_path)
    lock.release()
    lock.release()  # of a run that failed: again
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_has_none(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_file_that_an_ending_run_removes_while_it_is_locked_is_not_the_lock(tmp_path, monkeypatch):
    """The first run ends between the second one's open and its lock; a third one would find no file and begin too."""
    lockf, calls = run_lock.fcntl.lockf, []

    def lock(descriptor, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        return lockf(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "lockf", lock)
    second = RunLock(tmp_path)
    assert len(calls) == 2 and (tmp_path / ".lock").exists()
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_a_run_in_a_folder_of_the_same_name_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = RunLock(folder)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    other = RunLock(folder)
    first.release()
    assert (folder / ".lock").exists()
    other.release()
