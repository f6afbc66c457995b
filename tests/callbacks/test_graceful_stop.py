"""What a signal saves, and what is said about it."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.callbacks import GracefulStop, RolloutCheckpoint


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


def test_a_new_checkpoint_replaces_the_last_and_keeps_the_one_before(tmp_path):
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
