"""Seconds by phase and speeds of a rollout, by hand."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.training.timing import Stopwatch

NOW = {"count/rollout_tokens": 700.0, "count/train_tokens": 90.0}
BEFORE = {"count/rollout_tokens": 100.0, "count/train_tokens": 30.0}


def metrics(**seconds: float) -> dict[str, float]:
    watch = Stopwatch()
    watch.seconds = seconds
    found = watch.metrics(NOW, BEFORE)
    del found["time/step_s"]
    return found


def test_speed_is_what_was_added_by_the_time_of_the_phase():
    assert metrics(rollout=2.0, update=3.0) == {
        "time/rollout_s": 2.0, "time/update_s": 3.0,
        "perf/rollout_tokens_per_s": 300.0, "perf/train_tokens_per_s": 20.0,
    }  # fmt: skip


@pytest.mark.parametrize("ahead", [4.0, 0.0])
def test_a_rollout_generated_ahead_took_its_own_time_however_short(ahead):
    found = metrics(rollout=2.0, rollout_ahead=ahead, update=3.0)
    assert found["time/rollout_s"] == 2.0 and found["time/rollout_ahead_s"] == ahead
    assert found["perf/rollout_tokens_per_s"] == pytest.approx(600 / max(ahead, 1e-9))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_phase_ends_when_a_gpu_has_done_what_it_was_told(on_gpu, monkeypatch):
    """Kernels are only queued: what is still to be done would be counted in a later phase."""
    waits: list[dict[str, float]] = []
    watch = Stopwatch()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(dict(watch.seconds)))
    with watch("rollout"):
        pass
    with watch("update"):
        pass
    assert [list(before) for before in waits] == ([[], ["rollout"]] if on_gpu else [])
    with pytest.raises(ValueError, match="first"), watch("reward"):  # a GPU in trouble must not have the last word
        raise ValueError("first")
    assert len(waits) == 2 * on_gpu and list(watch.seconds) == ["rollout", "update", "reward"]
