"""One line that says where the run is: reward, length, speed, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class ProgressLine(L.Callback):
    """A live bar on a terminal; elsewhere a plain line every ``every_n_rollouts`` rollouts."""

    def __init__(self, every_n_rollouts: int = 1) -> None:
        self.every_n_rollouts = every_n_rollouts
        self._progress: Progress | None = None
        self._start = 0.0
        self._done_at_start = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        self._start, self._done_at_start = time.monotonic(), pl_module.rollouts_done
        if trainer.is_global_zero and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("rollout {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"),
                console=Console(),
            )  # fmt: skip
            self._task = self._progress.add_task("", total=pl_module.max_rollouts, completed=pl_module.rollouts_done)
            self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the bar, or prints a line."""
        text = self._describe(pl_module)
        if self._progress is not None:
            self._progress.update(self._task, completed=pl_module.rollouts_done, description=text)
        elif trainer.is_global_zero and pl_module.rollouts_done % self.every_n_rollouts == 0:
            print(f"rollout {pl_module.rollouts_done}/{pl_module.max_rollouts}  {text}", flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the bar, so that the error stands below it."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _describe(self, pl_module: Any) -> str:
        metrics = pl_module.last_metrics
        done = pl_module.rollouts_done - self._done_at_start
        left = (time.monotonic() - self._start) / max(1, done) * (pl_module.max_rollouts - pl_module.rollouts_done)
        clip = metrics.get("clip_frac_low", 0.0) + metrics.get("clip_frac_high", 0.0)
        return (
            f"reward {metrics['reward/mean']:.3f}  length {metrics['completion/mean_tokens']:.1f}  clipped {clip:.0%}  "
            f"{metrics['perf/rollout_tokens_per_s']:.0f} + {metrics['perf/train_tokens_per_s']:.0f} tokens/s  "
            f"left {int(left // 60)}:{int(left % 60):02d}"
        )
