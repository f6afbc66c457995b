"""What ends a rank that waits for another one: the first error of this run, and nothing else."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from gspo_lightning.distributed import first_error, rank_watch

# In place of the end of this process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture()
def watched(tmp_path, monkeypatch):
    """Rank 1 of two; what the watch does shows in ``ended``, and this process goes on."""
    ended = SimpleNamespace(code=None, left=0, over=threading.Event())

    def end(code):
        ended.code = code
        ended.over.set()
        raise SystemExit  # of the thread alone

    monkeypatch.setattr(rank_watch.os, "_exit", end)
    monkeypatch.setattr(rank_watch, "POLL_S", 0.01)
    monkeypatch.setattr(rank_watch, "GRACE_S", 0.05)
    monkeypatch.setenv("GSPO_LIGHTNING_STARTER", str(os.getppid()))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(first_error.tempfile, "tempdir", str(tmp_path))
    first_error.join(tmp_path / "run", 1, 2)

    def leave():
        ended.left += 1

    yield SimpleNamespace(folder=tmp_path / "run", ended=ended, begin=lambda: rank_watch.begin(tmp_path / "run", leave))
    rank_watch.stop()
    first_error.join(tmp_path / "run", 0, 1)


def note_of(rank, folder, monkeypatch, line="the cause", code=4):
    with monkeypatch.context() as patch:
        patch.setattr(first_error, "_rank", rank)
        first_error.record(folder, line, code)


def watches():
    return [thread for thread in threading.enumerate() if thread.name == "rank-watch"]


def test_the_error_of_another_rank_ends_this_one_with_its_line_and_code(watched, monkeypatch, capsys):
    watched.begin()
    assert len(watches()) == 1
    note_of(0, watched.folder, monkeypatch)
    assert watched.ended.over.wait(10)
    assert (watched.ended.code, watched.ended.left) == (4, 1)
    assert capsys.readouterr().err == "error: rank 0: the cause\n"


@pytest.mark.parametrize("case", ["of an earlier run", "its own", "the work is done", "alone"])
def test_what_does_not_end_a_rank(case, watched, monkeypatch, capsys):
    if case == "of an earlier run":
        note_of(0, watched.folder, monkeypatch)
    if case == "alone":
        first_error.join(watched.folder, 0, 1)
    watched.begin()
    assert len(watches()) == (case != "alone")
    if case == "the work is done":
        rank_watch.stop()
    if case != "of an earlier run":
        note_of(1 if case == "its own" else 0, watched.folder, monkeypatch)
    assert not watched.ended.over.wait(0.3)
    assert (watched.ended.left, capsys.readouterr().err) == (0, "")


def test_the_death_of_the_rank_that_has_started_this_one_ends_it(watched, monkeypatch, capsys):
    monkeypatch.setattr(rank_watch.sys, "argv", ["train.py", "hydra.job.name=train_ddp_process_1"])
    watched.begin()
    assert not watched.ended.over.wait(0.3)
    monkeypatch.setattr(rank_watch.os, "getppid", lambda: 1)
    assert watched.ended.over.wait(10)
    assert watched.ended.code == 1
    assert capsys.readouterr().err == f"error: {first_error.DIED}\n"


@pytest.mark.parametrize("node", ["0", "1"])
def test_the_error_of_rank_0_ends_a_rank_that_it_has_started_also_if_it_came_before_the_watch(
    node, watched, monkeypatch, capsys
):
    """Another node's rank 0 does not start this one, and may not have removed the note of an earlier run yet."""
    monkeypatch.setattr(rank_watch.sys, "argv", ["train.py", "hydra.job.name=train_ddp_process_1"])
    monkeypatch.setenv("NODE_RANK", node)
    note_of(0, watched.folder, monkeypatch)
    watched.begin()
    assert watched.ended.over.wait(10 if node == "0" else 0.3) == (node == "0")
    assert capsys.readouterr().err == ("error: rank 0: the cause\n" if node == "0" else "")


def test_a_shell_or_srun_that_goes_does_not(watched, monkeypatch):
    watched.begin()
    assert os.environ["GSPO_LIGHTNING_STARTER"] == str(os.getpid()), "for the ranks that this one will start"
    monkeypatch.setattr(rank_watch.os, "getppid", lambda: 1)
    assert not watched.ended.over.wait(0.3)


def test_where_a_launcher_stands_between_two_ranks_none_is_taken_for_dead(watched, monkeypatch):
    monkeypatch.setattr(rank_watch.sys, "argv", ["train.py", "hydra.job.name=train_ddp_process_1"])
    with subprocess.Popen(["sleep", "60"]) as starter:
        monkeypatch.setenv("GSPO_LIGHTNING_STARTER", str(starter.pid))
        watched.begin()
        assert not watched.ended.over.wait(0.3)
        starter.kill()


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_whose_starter_was_dead_before_the_watch_began_ends_too(asked, watched, monkeypatch, capsys):
    """As where rank 0 is killed while the others still import; also if nobody has asked for its exit status yet."""
    if not asked and not Path("/proc/self/stat").exists():
        pytest.skip("only Linux says so")
    monkeypatch.setattr(rank_watch.sys, "argv", ["train.py", "hydra.job.name=train_ddp_process_1"])
    with subprocess.Popen(["true"]) as starter:
        os.waitid(os.P_PID, starter.pid, os.WEXITED | (0 if asked else os.WNOWAIT))
        monkeypatch.setenv("GSPO_LIGHTNING_STARTER", str(starter.pid))
        watched.begin()
        assert watched.ended.over.wait(10)
    assert watched.ended.code == 1 and capsys.readouterr().err == f"error: {first_error.DIED}\n"


@pytest.mark.parametrize(
    ("by", "expected"),
    [(None, ["killed"]), (0, [0.1, "killed"]), (1, [])],
    ids=["nobody", "another rank", "this rank, which ends by itself"],
)
def test_lightning_kills_a_rank_only_after_it_could_say_the_first_error(by, expected, watched, monkeypatch):
    done = []
    monkeypatch.setattr(rank_watch.time, "sleep", lambda seconds: done.append(seconds))
    go = threading.Event()

    class Observer(threading.Thread):
        def _terminate_all(self):
            done.append("killed")

    observer = Observer(target=go.wait, name="child-process-observer", daemon=True)
    observer.start()
    watch = rank_watch.RankWatch(watched.folder, lambda: None)
    watch.stop()
    for _ in range(2):  # at every look
        rank_watch.change_kill(watch._patient)
    if by is not None:
        note_of(by, watched.folder, monkeypatch)
    observer._terminate_all()
    go.set()
    assert done == expected
