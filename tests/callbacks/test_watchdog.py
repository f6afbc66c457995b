"""A rollout that takes far longer than usual says where every thread stands, once."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from gspo_lightning.callbacks import Watchdog, watchdog
from gspo_lightning.errors import UserError

TRAINER, MODULE = SimpleNamespace(), SimpleNamespace(rollouts_done=4)


class Clock:
    """Seconds that the test sets; alarms that the test rings."""

    def __init__(self, monkeypatch):
        self.now, self.alarms = 0.0, []
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog.threading, "Timer", self.timer)

    def timer(self, seconds, function, arguments):
        alarm = SimpleNamespace(seconds=seconds, ring=lambda: function(*arguments), start=lambda: None, alive=True)
        alarm.cancel = lambda: setattr(alarm, "alive", False)
        self.alarms.append(alarm)
        return alarm

    def rollouts(self, dog, *seconds):
        for duration in seconds:
            dog.on_train_batch_start(TRAINER, MODULE, None, 0)
            self.now += duration
            dog.on_train_batch_end(TRAINER, MODULE, None, None, 0)


def test_the_limit_is_ten_medians_once_the_median_is_known(monkeypatch):
    clock, dog = Clock(monkeypatch), Watchdog(factor=10, min_rollouts=3, min_s=1)
    clock.rollouts(dog, 2.0, 3.0, 100.0)
    assert clock.alarms == [] and dog.limit_s == 30.0
    clock.rollouts(dog, 3.0)
    assert [(a.seconds, a.alive) for a in clock.alarms] == [(30.0, False)]


def test_short_rollouts_are_never_too_long_and_zero_is_off(monkeypatch):
    clock, dog = Clock(monkeypatch), Watchdog(factor=10, min_rollouts=1, min_s=60)
    clock.rollouts(dog, 0.01)
    assert dog.limit_s == 60
    off = Watchdog(factor=0, min_rollouts=1)
    clock.rollouts(off, 1.0, 1.0)
    assert off.limit_s is None and clock.alarms == []


def test_it_names_the_rollout_and_the_line_every_thread_is_in(monkeypatch, capfd):
    waits, entered, clock = threading.Event(), threading.Event(), Clock(monkeypatch)
    dog = Watchdog(factor=10, min_rollouts=1, min_s=0)
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


@pytest.mark.parametrize("bad", [{"factor": 0.5}, {"min_rollouts": 0}, {"min_s": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=r"callbacks.watchdog"):
        Watchdog(**bad)
