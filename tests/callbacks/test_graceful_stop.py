"""What a signal saves, and what is said about it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.callbacks import GracefulStop, RolloutCheckpoint
from gspo_lightning.callbacks import checkpoint as checkpoint_module
from gspo_lightning.callbacks import graceful_stop as graceful_stop_module
from gspo_lightning.distributed.failing import ErrorOfAllRanks
from gspo_lightning.errors import UserError
from gspo_lightning.program import training_run
from gspo_lightning.rollout import WeightSyncError
from gspo_lightning.training.out_of_memory import OutOfMemoryError
from tests.conf.test_every_key import run


class Trainer:
    """Remembers what was saved; writes a small file as a checkpoint."""

    is_global_zero = True
    should_stop = False
    limit_val_batches = 1.0
    strategy = SimpleNamespace(barrier=lambda name: None)

    def __init__(self, module):
        self.module = module

    def save_checkpoint(self, path):
        path.write_text(f"rollout {self.module.rollouts_done}")


@pytest.mark.parametrize(("rollout", "due"), [(4, False), (3, True)])
def test_a_stop_saves_the_rollout_in_hand_behind_a_validation_that_is_due(rollout, due, tmp_path, capsys):
    module = SimpleNamespace(rollouts_done=rollout, max_rollouts=100, device=torch.device("cpu"))
    trainer = Trainer(module)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=50, validate_every_n_rollouts=3)
    stop = GracefulStop(checkpoint, grace_s=60)
    stop._on_signal(signal.SIGTERM, None)
    for callback in (checkpoint, stop):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert trainer.should_stop
    assert checkpoint.last.exists() is not due
    assert (trainer.limit_val_batches > 0) is due
    if due:
        assert "saved in" not in capsys.readouterr().out
        for callback in (checkpoint, stop):
            callback.on_validation_end(trainer, module)
    assert checkpoint.last.read_text() == f"rollout {rollout}"
    assert f"Stopped after rollout {rollout}, saved in {checkpoint.last}" in capsys.readouterr().out
    assert stop._timer is None


def test_a_signal_during_a_validation_stops_behind_it(tmp_path, capsys):
    """Otherwise one more rollout would run, past the line that says where the run stopped, and be announced again."""
    module = SimpleNamespace(rollouts_done=3, max_rollouts=100, device=torch.device("cpu"))
    trainer = Trainer(module)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=1, validate_every_n_rollouts=3)
    stop = GracefulStop(checkpoint, grace_s=60)
    for callback in (checkpoint, stop):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert not trainer.should_stop
    stop._on_signal(signal.SIGTERM, None)
    for callback in (checkpoint, stop):
        callback.on_validation_end(trainer, module)
    assert trainer.should_stop and stop._timer is None
    assert f"Stopped after rollout 3, saved in {checkpoint.last}" in capsys.readouterr().out


@pytest.mark.parametrize(("rollout", "due"), [(4, False), (3, True)])
def test_what_another_callback_ends_is_saved_before_a_validation_that_is_not_due(rollout, due, tmp_path):
    """``trainer.max_time`` and ``callbacks.health.stop_on``: Lightning would validate first, and a kill lose it all."""
    module = SimpleNamespace(rollouts_done=rollout, max_rollouts=100, device=torch.device("cpu"))
    trainer = Trainer(module)
    trainer.should_stop = True
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=50, validate_every_n_rollouts=3)
    checkpoint.on_train_batch_end(trainer, module, None, None, 0)
    assert checkpoint.last.exists() is not due
    assert (trainer.limit_val_batches > 0) is due
    checkpoint.on_validation_end(trainer, module)
    assert checkpoint.last.read_text() == f"rollout {rollout}"


def test_a_stop_does_not_save_again_what_is_saved(tmp_path):
    """The checkpoint before would be lost, and be the same one."""
    module = SimpleNamespace(rollouts_done=1, max_rollouts=9, device=torch.device("cpu"))
    trainer, checkpoint = Trainer(module), RolloutCheckpoint(tmp_path, every_n_rollouts=1)
    for module.rollouts_done in (1, 2):
        checkpoint.on_train_batch_end(trainer, module, None, None, 0)
    checkpoint.end(trainer, module)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"last.ckpt": "rollout 2", "previous.ckpt": "rollout 1"}


@pytest.mark.parametrize("stopped", [True, False])
def test_behind_the_last_rollout_there_is_a_validation_though_none_is_due(stopped, tmp_path):
    module = SimpleNamespace(rollouts_done=4, max_rollouts=4, device=torch.device("cpu"))
    trainer = Trainer(module)
    trainer.should_stop = stopped  # by the module
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=50)
    checkpoint.on_train_batch_end(trainer, module, None, None, 0)
    assert checkpoint.last.read_text() == "rollout 4" and trainer.limit_val_batches == 1.0


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_new_checkpoint_replaces_the_last_and_keeps_the_one_before(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # exFAT, and many network and FUSE mounts

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    module = SimpleNamespace(rollouts_done=0, max_rollouts=100, device=torch.device("cpu"))
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=2)
    for module.rollouts_done in range(1, 7):
        checkpoint.on_train_batch_end(Trainer(module), module, None, None, 0)
    assert (tmp_path / "last.ckpt").read_text() == "rollout 6"
    assert (tmp_path / "previous.ckpt").read_text() == "rollout 4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_failed_write_leaves_the_last_checkpoint_alone(tmp_path):
    module = SimpleNamespace(rollouts_done=2, max_rollouts=100, device=torch.device("cpu"))
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=1)
    checkpoint.save(Trainer(module), module)
    broken = Trainer(module)

    def fail(path):
        path.write_text("half")
        raise OSError("no space left on device")

    broken.save_checkpoint = fail
    module.rollouts_done = 3
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(broken, module)
    assert checkpoint.last.read_text() == "rollout 2"


@pytest.mark.parametrize(
    ("rollout", "goes_on", "line"),
    [
        (8, True, None),
        (7, True, "Slurm job 77 was requeued; with ckpt_path=auto and the same hydra.run.dir it will resume"),
        (7, False, "not requeued: without ckpt_path=auto it would not resume from here"),
    ],
    ids=["done", "goes on", "would begin anew"],
)
@pytest.mark.parametrize("validation", [None, 1])
def test_a_slurm_job_is_requeued_once_and_only_where_it_goes_on(
    rollout, goes_on, line, validation, tmp_path, capsys, monkeypatch
):
    """Behind the last rollout Lightning validates, whether that is due or not: two boundaries."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    asked: list[list[str]] = []
    monkeypatch.setattr("gspo_lightning.callbacks.requeue.subprocess.run", lambda call, **_: asked.append(call))
    module = SimpleNamespace(rollouts_done=rollout, max_rollouts=8, device=torch.device("cpu"))
    trainer = Trainer(module)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=1, validate_every_n_rollouts=validation)
    stop = GracefulStop(checkpoint, grace_s=60, goes_on=goes_on)
    stop._on_signal(signal.SIGUSR1, None)
    for callback in (checkpoint, stop):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    for callback in (checkpoint, stop):
        callback.on_validation_end(trainer, module)
    said = [f"Stopped after rollout {rollout}, saved in {checkpoint.last}", *([line] if line else [])]
    assert capsys.readouterr().out.splitlines()[1:] == said
    assert asked == ([["scontrol", "requeue", "77"]] if line and goes_on else [])


def test_a_run_that_fails_after_a_signal_leaves_no_alarm_and_gives_the_signals_back(tmp_path):
    """The alarm would end the process inside the next job of a sweep."""
    module = SimpleNamespace(rollouts_done=1, max_rollouts=8, device=torch.device("cpu"))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    stop = GracefulStop(RolloutCheckpoint(tmp_path, every_n_rollouts=1), grace_s=60)
    stop.on_train_start(Trainer(module), module)
    assert [signal.getsignal(number) for number in numbers] == [stop._on_signal] * 3
    stop._on_signal(signal.SIGTERM, None)
    alarm = stop._timer
    stop.on_exception(Trainer(module), module, ValueError())
    assert alarm.finished.is_set() and stop._timer is None
    assert [signal.getsignal(number) for number in numbers] == before


IN_PROCESS, SERVERS = SimpleNamespace(), SimpleNamespace(samples_on="first_rank")


@pytest.mark.parametrize(
    ("engine", "ranks", "saved"),
    [
        (IN_PROCESS, 1, True),
        (IN_PROCESS, 2, False),
        (SimpleNamespace(engine=IN_PROCESS), 2, False),
        (SERVERS, 2, True),
        (SimpleNamespace(engine=SERVERS), 2, True),
        (SimpleNamespace(engine=IN_PROCESS, samples_on="first_rank"), 2, True),
    ],
    ids=["one rank", "one of two ranks", "one of two sharded ranks", "servers", "servers of sharded ranks", "its own"],
)
def test_a_lost_engine_saves_the_run_unless_one_rank_may_be_alone_with_it(engine, ranks, saved, tmp_path, monkeypatch):
    """The others would be in another collective, and all would wait until the time limit of the process group."""
    monkeypatch.setattr(checkpoint_module, "world_size", lambda: ranks, raising=False)
    module = SimpleNamespace(rollouts_done=2, max_rollouts=8, device=torch.device("cpu"), engine=engine)
    trainer, waits = Trainer(module), []
    trainer.state = SimpleNamespace(fn="fit")
    trainer.strategy = SimpleNamespace(barrier=waits.append)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=5)
    checkpoint.on_exception(trainer, module, WeightSyncError("other weights"))
    assert waits == (["checkpoint folder", "checkpoint"] if saved else [])
    assert checkpoint.last.exists() is saved


@pytest.mark.parametrize(
    ("done", "saved_at", "fn", "error", "saved"),
    [
        (2, None, "fit", WeightSyncError("lost"), True),
        (2, 1, "fit", WeightSyncError("lost"), True),
        (2, 2, "fit", WeightSyncError("lost"), False),
        (0, None, "fit", WeightSyncError("lost"), False),
        (2, None, "validate", WeightSyncError("lost"), False),
        (2, None, "fit", None, True),
        (2, 1, "fit", None, True),
        (2, 2, "fit", None, False),
        (0, None, "fit", None, False),
    ],
)
def test_what_ends_a_run_saves_whole_rollouts_that_are_not_saved_yet(done, saved_at, fn, error, saved, tmp_path):
    module = SimpleNamespace(rollouts_done=done, max_rollouts=8, engine=IN_PROCESS)
    trainer, checkpoint = Trainer(module), RolloutCheckpoint(tmp_path, every_n_rollouts=5)
    trainer.state, checkpoint.saved_at = SimpleNamespace(fn=fn), saved_at
    if error is None:
        checkpoint.on_train_end(trainer, module)
    else:
        checkpoint.on_exception(trainer, module, error)
    assert checkpoint.last.exists() is saved and checkpoint.saved_at == (done if saved else saved_at)


@pytest.mark.parametrize(
    ("changes", "error", "saved"),
    [
        ({}, UserError("of a reward function"), True),
        ({"update_begun": True}, UserError("of a callback between two steps"), False),
        ({"states_before": None}, UserError("of a callback behind the rollout, whose row is not written"), False),
        ({"states_before": None, "validating": True}, UserError("of a reward function"), True),
        ({"states_before": None, "validating": True}, BrokenPipeError("of a callback behind the validation"), False),
        ({"ranks": 2}, UserError("on one rank"), False),
        ({"ranks": 2}, ErrorOfAllRanks("of a reward function"), True),
        ({}, OutOfMemoryError("in a micro-batch"), True),
        ({"update_begun": True}, OutOfMemoryError("in the optimizer step"), False),
        ({}, ConnectionError("of an own engine"), True),
        ({}, KeyboardInterrupt(), False),
    ],
)
def test_a_mistake_between_two_updates_saves_whole_rollouts(changes, error, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "world_size", lambda: changes.get("ranks", 1))
    module = SimpleNamespace(
        rollouts_done=2, max_rollouts=8, engine=IN_PROCESS,
        states_before=changes.get("states_before", {}), update_begun=changes.get("update_begun", False),
    )  # fmt: skip
    trainer, checkpoint = Trainer(module), RolloutCheckpoint(tmp_path, every_n_rollouts=5)
    trainer.state, trainer.validating = SimpleNamespace(fn="fit"), changes.get("validating", False)
    checkpoint.on_exception(trainer, module, error)
    assert checkpoint.last.exists() is saved


@pytest.mark.parametrize(
    ("every", "changes", "refused"),
    [
        (2, {}, True),
        (2, {"val_check_batch": 2}, False),
        (2, {"limit_val_batches": 0}, False),
        (2, {"fast_dev_run": 1}, False),
        (None, {}, False),
    ],
)
def test_validations_are_waited_for_only_where_the_trainer_runs_them(every, changes, refused, tmp_path):
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=2, validate_every_n_rollouts=every)
    settings = {"limit_val_batches": 1.0, "fast_dev_run": 0, "val_check_batch": 1, "ckpt_path": None, **changes}
    trainer = SimpleNamespace(callbacks=[checkpoint], **settings)
    with pytest.raises(UserError, match=r"give it val_check_interval=2") if refused else contextlib.nullcontext():
        checkpoint.on_train_start(trainer, SimpleNamespace(rollouts_done=0))


SENT: list[int] = []


def signals(completions, **_):
    """A reward that sends its process the signals in `SENT`, once."""
    while SENT:
        os.kill(os.getpid(), SENT.pop())
    return [0.0 for _ in completions]


def leave(code):
    raise SystemExit(code)


@pytest.fixture
def slurm(monkeypatch):
    """A job of one task, in which Lightning would take signals and checkpoints into its own hands."""
    names = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0",
             "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    asked: list[list[str]] = []
    monkeypatch.setattr("gspo_lightning.callbacks.requeue.subprocess.run", lambda call, **_: asked.append(call))
    return asked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "ckpt_path", "requeued"),
    [(signal.SIGTERM, "null", False), (signal.SIGUSR1, "null", False), (signal.SIGUSR1, "auto", True)],
)
def test_a_signal_before_the_first_rollout_ends_the_run_at_once(
    number, ckpt_path, requeued, slurm, tmp_path, monkeypatch, capsys
):
    """There is nothing to save; Lightning would swallow SIGTERM there, and save a file that no resuming looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graceful_stop_module.os, "_exit", leave)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    SENT.append(number)
    reward = (
        "+reward.functions.signals={_target_:gspo_lightning.rewards.RewardSpec,weight:1.0,timeout_s:null,"
        "function:{_target_:hydra.utils.get_method,path:tests.callbacks.test_graceful_stop.signals}}"
    )
    with capsys.disabled(), pytest.raises(SystemExit) as left:
        run(tmp_path / "run", "logger=none", f"ckpt_path={ckpt_path}", reward)
    assert left.value.code == 128 + number and not SENT
    assert slurm == ([["scontrol", "requeue", "77"]] if requeued else [])
    assert [path.name for path in tmp_path.rglob("*") if path.suffix == ".ckpt"] == []
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.filterwarnings("ignore")
def test_on_slurm_a_fresh_run_does_not_go_on_from_what_lies_in_the_current_folder(slurm, tmp_path, monkeypatch):
    """Lightning would load it for ``ckpt_path=null``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of somebody else")
    left = run(tmp_path / "run", "logger=none", "max_rollouts=1")
    assert [row["step"] for row in left["metrics"]] == ["0", "1"]


def test_until_a_validation_begins_sigterm_ends_a_process_by_itself(tmp_path):
    """A rank that waits for others in a library would never come to a handler."""
    stop, trainer = (
        GracefulStop(RolloutCheckpoint(tmp_path, every_n_rollouts=1), 60),
        SimpleNamespace(is_global_zero=True),
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        stop.listen(trainer)
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == [before[0], stop._on_signal]
        stop.on_validation_start(trainer, None)
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
    finally:
        stop.give_back()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.filterwarnings("ignore")
def test_the_warning_of_slurm_does_not_end_an_export(slurm, tmp_path, monkeypatch):
    """By its default SIGUSR1 ends a process at once, with most of the time left that Slurm gives."""
    export, screen = training_run.export_policy, io.StringIO()

    def warned(*arguments, **settings):
        with contextlib.redirect_stdout(screen):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        export(*arguments, **settings)

    monkeypatch.setattr(training_run, "export_policy", warned)
    before = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("not handled"))  # red, and not the end of the tests
    monkeypatch.setattr(graceful_stop_module.signal, "SIG_DFL", signal.getsignal(signal.SIGUSR1))
    try:
        run(tmp_path / "run", "logger=none", "max_rollouts=1", "ckpt_path=auto")
    finally:
        signal.signal(signal.SIGUSR1, before)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    line = "SIGUSR1: all rollouts are done; finishing the export. If that is cut short, resume with ckpt_path="
    assert screen.getvalue() == f"{line}{last}\n"
    assert (tmp_path / "run" / "summary.json").exists() and not slurm
