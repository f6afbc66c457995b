"""A rollout that takes far longer than usual says where every thread stands, once."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from gspo_lightning.callbacks import RolloutCheckpoint, Watchdog, watchdog
from gspo_lightning.errors import UserError
from tests.command_line import run

TRAINER, MODULE = SimpleNamespace(callbacks=[]), SimpleNamespace(rollouts_done=4)


class Clock:
    """Seconds that the test sets; alarms that the test rings."""

    def __init__(self, monkeypatch):
        self.now, self.alarms = 0.0, []
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog.threading, "Timer", self.timer)

    def timer(self, seconds, function, arguments=None):
        alarm = SimpleNamespace(
            seconds=seconds, ring=lambda: function(*(arguments or ())), start=lambda: None, alive=True
        )
        alarm.cancel = lambda: setattr(alarm, "alive", False)
        self.alarms.append(alarm)
        return alarm

    def rollouts(self, dog, *seconds):
        for duration in seconds:
            dog.on_train_batch_start(TRAINER, MODULE, None, 0)
            self.now += duration
            dog.on_train_batch_end(TRAINER, MODULE, None, None, 0)


def test_the_limit_is_ten_medians_once_the_median_is_known(monkeypatch):
    clock, dog = Clock(monkeypatch), Watchdog(factor=10, min_rollouts=3, min_s=1, end_s=None)
    clock.rollouts(dog, 2.0, 3.0, 100.0)
    assert clock.alarms == [] and dog.limit_s == 30.0
    clock.rollouts(dog, 3.0)
    assert [(a.seconds, a.alive) for a in clock.alarms] == [(30.0, False)]


def test_short_rollouts_are_never_too_long_and_zero_is_off(monkeypatch):
    clock, dog = Clock(monkeypatch), Watchdog(factor=10, min_rollouts=1, min_s=60, end_s=None)
    clock.rollouts(dog, 0.01)
    assert dog.limit_s == 60
    off = Watchdog(factor=0, min_rollouts=1, end_s=None)
    clock.rollouts(off, 1.0, 1.0)
    assert off.limit_s is None and clock.alarms == []


def test_waits_that_no_timer_has_are_refused_or_shortened(monkeypatch):
    """A thread that waits for ever raises at once, and nothing would watch the run."""
    with pytest.raises(
        UserError, match=r"^callbacks.watchdog.end_s=inf must be above 0 and at most 1000000; null means"
    ):
        Watchdog(end_s=float("inf"))
    with pytest.raises(UserError, match="^callbacks.watchdog.factor=nan must be above 1"):
        Watchdog(factor=float("nan"))
    clock, dog = Clock(monkeypatch), Watchdog(min_rollouts=1, min_s=float("inf"), end_s=None)
    clock.rollouts(dog, 1.0)
    assert dog.limit_s < threading.TIMEOUT_MAX


def test_it_names_the_rollout_and_the_line_every_thread_is_in(monkeypatch, capfd):
    waits, entered, clock = threading.Event(), threading.Event(), Clock(monkeypatch)
    dog = Watchdog(factor=10, min_rollouts=1, min_s=0, end_s=None)
    clock.rollouts(dog, 2.0)

    def a_reward_that_hangs():
        entered.set()
        waits.wait(30)

    thread = threading.Thread(target=a_reward_that_hangs)
    thread.start()
    entered.wait(30)
    dog.on_train_batch_start(TRAINER, MODULE, None, 0)
    clock.alarms[-1].ring()
    waits.set()
    thread.join()
    seen = capfd.readouterr().err
    assert "rollout 5 has taken 20 s, 10 times the median of 2.0 s" in seen
    assert "in a_reward_that_hangs" in seen and "in test_it_names_the_rollout" in seen


def test_progress_puts_the_end_off_and_the_end_of_the_run_calls_it_off(monkeypatch):
    clock, dog = Clock(monkeypatch), Watchdog(factor=0, end_s=100)
    dog.on_validation_batch_end(TRAINER)
    assert clock.alarms == []  # before training nothing is expected
    dog.on_train_batch_start(TRAINER, MODULE, None, 0)
    dog.on_train_batch_end(TRAINER, MODULE, None, None, 0)
    dog.on_validation_batch_end(TRAINER)
    assert [(a.seconds, a.alive) for a in clock.alarms] == [(100, False), (100, False), (100, True)]
    dog.on_train_end(TRAINER, MODULE)
    assert not any(a.alive for a in clock.alarms)


HANGS = """
import time
def f(completions, **_):
    if f.calls:
        time.sleep(600)
    f.calls += 1
    return [0.0, 1.0] * (len(completions) // 2)
f.calls = 0
"""


def test_a_reward_that_never_returns_ends_the_run_and_is_named_in_the_stacks(tmp_path):
    (tmp_path / "my_rewards.py").write_text(HANGS)
    done = run(
        "experiment=micro", "print_config=false", "hydra.run.dir=run", "validation.num_generations=1",
        "data.task.num_validation=0", "callbacks.watchdog.end_s=5",
        "reward.functions.letter_share.function.path=my_rewards.f", cwd=tmp_path, expect=1,
    )  # fmt: skip
    assert 'my_rewards.py", line 5 in f' in done.stderr
    assert "no rollout or validation has finished for 5 s (callbacks.watchdog.end_s)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("is_saved", [False, True])
def test_it_says_what_a_run_that_hangs_goes_on_from(is_saved, monkeypatch, tmp_path, capsys):
    clock, dog = Clock(monkeypatch), Watchdog(factor=0, end_s=100)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=1)
    if is_saved:
        checkpoint.last.touch()
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    dog.on_train_batch_start(SimpleNamespace(callbacks=[dog, checkpoint]), MODULE, None, 0)
    clock.alarms[-1].ring()
    stands = f"resume with ckpt_path={tmp_path}/last.ckpt" if is_saved else "no checkpoint has been written yet"
    assert codes == [1] and capsys.readouterr().err == (
        "error: no rollout or validation has finished for 100 s (callbacks.watchdog.end_s); above is what each "
        f"thread was doing; {stands}\n"
    )


@pytest.mark.parametrize("bad", [{"factor": 0.5}, {"min_rollouts": 0}, {"min_s": -1}, {"end_s": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=r"callbacks.watchdog"):
        Watchdog(**bad)
