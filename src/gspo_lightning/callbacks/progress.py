"""One line that says where the run is: reward, length, speed, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gspo_lightning.errors import UserError
from gspo_lightning.screen import counted

WIDE = 120
"""Least columns of a terminal for the bar to show the shares of clipped ratios and truncated completions too."""


class ProgressLine(L.Callback):
    """A live bar on a terminal; elsewhere a plain line every ``every_n_rollouts`` rollouts.

    Each validation adds one line with the accuracies on held-out prompts. Rank 0 alone prints.

    Args:
        every_n_rollouts: rollouts between lines if the output is no terminal; the last rollout always has a line.
        clock: returns seconds, for the time left.
    """

    def __init__(self, every_n_rollouts: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        if every_n_rollouts < 1:
            raise UserError(f"callbacks.progress.every_n_rollouts={every_n_rollouts} must be at least 1")
        self.every_n_rollouts, self.clock = every_n_rollouts, clock
        self._progress: Progress | None = None
        self._start = 0.0
        self._done_at_start = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Starts the clock, and the bar if there is a terminal."""
        self._start, self._done_at_start = self.clock(), pl_module.rollouts_done
        console = Console()
        if trainer.is_global_zero and sys.stdout.isatty() and not console.is_dumb_terminal:
            columns = (
                TextColumn("rollout {task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("", total=pl_module.max_rollouts, completed=pl_module.rollouts_done)
            self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the bar, or prints a line."""
        done, total = pl_module.rollouts_done, pl_module.max_rollouts
        left_s = (self.clock() - self._start) / max(1, done - self._done_at_start) * (total - done)
        if self._progress is not None:
            text = describe(pl_module.last_metrics, left_s, shares=self._progress.console.width >= WIDE)
            self._progress.update(self._task, completed=done, description=text)
        elif trainer.is_global_zero and (done % self.every_n_rollouts == 0 or done >= total):
            print(f"rollout {done}/{total}  {describe(pl_module.last_metrics, left_s)}", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Says that the validation before or behind all rollouts has begun: it may take as long as several of them."""
        outside = pl_module.rollouts_done in (0, pl_module.max_rollouts)
        if outside and trainer.is_global_zero and not trainer.sanity_checking:
            self._print("measuring on held-out prompts")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Prints one line with the accuracies."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        values = "  ".join(
            f"{name.removeprefix('val/').replace('_', ' ')} {value:.3f}"
            for name, value in pl_module.last_validation.items()
        )
        self._print(f"held-out after {counted(pl_module.rollouts_done, 'rollout')}  {values}")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the bar, so that the error is printed below it."""
        self._close()

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(metrics: dict[str, float], left_s: float, shares: bool = True) -> str:
    """The numbers of a rollout in one line; throughput is that of sampling and of the update."""
    parts = [f"reward {metrics['reward/mean']:.3f}", f"length {metrics['completion/mean_tokens']:.1f}"]
    if shares and "clip_frac_high" in metrics:  # a loss without a clip has no such metric
        parts.append(f"ratio clipped {metrics['clip_frac_low'] + metrics['clip_frac_high']:.0%}")
    if shares and "completion/truncated_frac" in metrics:
        parts.append(f"truncated {metrics['completion/truncated_frac']:.0%}")
    # The speed of a rollout that was sampled before a resume may be unknown.
    rollout, update = metrics.get("perf/rollout_tokens_per_s"), metrics["perf/train_tokens_per_s"]
    sampled = "?" if rollout is None else f"{rollout:.0f}"
    return "  ".join([*parts, f"{sampled} + {update:.0f} tokens/s", f"left {format_time(left_s)}"])


def format_time(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
