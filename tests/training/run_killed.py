"""A run that SIGKILL ends while it trains on its third rollout: run_killed.py <model> <folder of its checkpoints>."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

import lightning as L
import torch

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from tests.training.test_part_states import fit, made


class Kill(L.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.rollouts_done == 2:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    model, checkpoints = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    fit(made(model), callbacks=[Kill(), RolloutCheckpoint(checkpoints, 1)])
