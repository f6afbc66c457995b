"""The progress line: its numbers, its time left, and plain lines where there is no terminal."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from gspo_lightning.callbacks import ProgressLine
from gspo_lightning.callbacks.progress import describe, format_time
from tests.callbacks.fakes import OTHER_RANK, TRAINER, FakeModule

METRICS = {
    "reward/mean": 0.98437, "completion/mean_tokens": 9.04, "clip_frac_low": 0.125, "clip_frac_high": 0.25,
    "completion/truncated_frac": 0.0625,
    "perf/rollout_tokens_per_s": 149.6, "perf/train_tokens_per_s": 75.2,
}  # fmt: skip


def rollouts(line, module, steps, clock=None, seconds=0.0):
    for step in steps:
        if clock is not None:
            clock[0] += seconds
        module.at(step).last_metrics = METRICS
        line.on_train_batch_end(TRAINER, module, None, None, 0)


def test_the_line_says_reward_length_clipping_truncation_speed_and_time_left():
    text = describe(METRICS, 65.0)
    assert text == "reward 0.984  length 9.0  ratio clipped 38%  truncated 6%  150 + 75 tokens/s  left 1:05"
    assert describe(METRICS, 65.0, shares=False) == "reward 0.984  length 9.0  150 + 75 tokens/s  left 1:05"
    without = {name: value for name, value in METRICS.items() if not name.startswith("clip_frac")}
    assert describe(without, 65.0) == "reward 0.984  length 9.0  truncated 6%  150 + 75 tokens/s  left 1:05"
    del without["perf/rollout_tokens_per_s"]
    assert describe(without, 65.0) == "reward 0.984  length 9.0  truncated 6%  ? + 75 tokens/s  left 1:05"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_time_is_written_in_minutes_and_hours(seconds, text):
    assert format_time(seconds) == text


def test_without_a_terminal_each_rollout_is_one_plain_line_with_the_time_left(capsys):
    clock = [100.0]
    line, module = ProgressLine(clock=lambda: clock[0]), FakeModule(total=8)
    line.on_train_start(TRAINER, module.at(4))  # resumed: the first four rollouts took none of this process's time
    rollouts(line, module, (5, 6), clock, seconds=10.0)
    lines = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[0] for text in lines] == ["rollout 5/8", "rollout 6/8"]
    assert [text.split()[-1] for text in lines] == ["0:30", "0:20"]


def test_every_n_rollouts_and_always_the_last(capsys):
    line, module = ProgressLine(every_n_rollouts=3), FakeModule(total=8)
    line.on_train_start(TRAINER, module)
    rollouts(line, module, range(1, 9))
    assert [text.split()[1] for text in capsys.readouterr().out.splitlines()] == ["3/8", "6/8", "8/8"]


def test_a_validation_is_one_line_and_other_ranks_are_silent(capsys):
    line, module = ProgressLine(), FakeModule().at(3)
    module.last_validation = {"val/accuracy": 0.25, "val/sampled_accuracy": 0.125}
    line.on_validation_end(TRAINER, module)
    line.on_train_start(OTHER_RANK, module)
    line.on_train_batch_end(OTHER_RANK, module, None, None, 0)
    line.on_validation_end(OTHER_RANK, module)
    assert capsys.readouterr().out == "held-out after 3 rollouts  accuracy 0.250  sampled accuracy 0.125\n"
    line.on_validation_end(TRAINER, module.at(1))
    assert capsys.readouterr().out.startswith("held-out after 1 rollout  accuracy ")


def test_validations_before_and_behind_all_rollouts_say_that_they_begin(capsys):
    line, module = ProgressLine(), FakeModule(total=8)
    said = []
    for trainer in (TRAINER, OTHER_RANK, SimpleNamespace(is_global_zero=True, sanity_checking=True)):
        for done in (0, 4, 8):
            line.on_validation_start(trainer, module.at(done))
            said.append(capsys.readouterr().out)
    assert said == ["measuring on held-out prompts\n", "", "measuring on held-out prompts\n", *[""] * 6]


@pytest.mark.parametrize("how", ["end", "exception"])
def test_on_a_terminal_there_is_one_live_line_that_closes_at_the_end_and_on_errors(how, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    line, module = ProgressLine(), FakeModule(total=8)
    line.on_train_start(TRAINER, module)
    rollouts(line, module, (1, 2))
    bar = line._progress
    assert bar is not None and bar.tasks[0].completed == 2 and bar.tasks[0].total == 8
    assert "reward 0.984" in bar.tasks[0].description
    (line.on_train_end(TRAINER, module) if how == "end" else line.on_exception(TRAINER, module, ValueError()))
    assert line._progress is None and bar.finished is False and not bar.live.is_started
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("rollout 2/8")]
    assert all(len(text) <= 80 for text in lines)
