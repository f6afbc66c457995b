"""Prints where each thread is when a rollout takes far longer than usual, and ends a run that hangs."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.errors import LONGEST_S, UserError, check_time_limit
from gspo_lightning.how_to_resume import resume_line


class Watchdog(L.Callback):
    """Prints the stack of every thread when a rollout with its update takes ``factor`` times the median so far.

    Once per rollout, on every rank. Engines, process groups and rewards with a ``timeout_s`` have their own limits;
    ``end_s`` is the limit of everything else.

    Args:
        factor: multiple of the median of the rollouts so far; 0 switches the report off.
        min_rollouts: rollouts needed for the median; before, nothing is printed.
        min_s: a rollout of at most this many seconds is never reported.
        end_s: seconds without a finished rollout or batch of held-out prompts after which the process ends, with exit
            code 1; None never ends it.
    """

    def __init__(
        self, factor: float = 10.0, min_rollouts: int = 3, min_s: float = 10.0, end_s: float | None = 14400.0
    ) -> None:
        if factor and not factor > 1:
            raise UserError(f"callbacks.watchdog.factor={factor} must be above 1, or 0 to switch it off")
        if min_rollouts < 1 or not min_s >= 0:
            raise UserError("callbacks.watchdog: min_rollouts must be at least 1 and min_s at least 0")
        if end_s is not None:
            check_time_limit("callbacks.watchdog.end_s", end_s, "; null means no limit")
        self.factor, self.min_rollouts, self.min_s, self.end_s = factor, min_rollouts, min_s, end_s
        self._seconds: list[float] = []
        self._timer: threading.Timer | None = None
        self._end: threading.Timer | None = None
        self._start = 0.0
        self._last: Path | None = None

    @property
    def limit_s(self) -> float | None:
        """Seconds after which the next rollout is reported; None if not known yet, or switched off."""
        if not self.factor or len(self._seconds) < self.min_rollouts:
            return None
        return min(LONGEST_S, max(self.min_s, self.factor * statistics.median(self._seconds)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the timers."""
        self._start = time.monotonic()
        self._last = next((c.last for c in trainer.callbacks if isinstance(c, RolloutCheckpoint)), None)  # type: ignore[attr-defined]
        self._expect_progress()
        if (limit := self.limit_s) is not None:
            self._timer = threading.Timer(limit, self.report, [pl_module.rollouts_done + 1, limit])
            self._timer.daemon = True
            self._timer.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restarts the timer of ``end_s``, cancels the other, and records the time of the rollout."""
        self._cancel()
        self._expect_progress()
        self._seconds.append(time.monotonic() - self._start)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Counts as progress: restarts the timer of ``end_s``."""
        if self._end is not None:
            self._expect_progress()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Cancels the timers."""
        self._cancel()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Cancels the timers."""
        self._cancel()

    def report(self, rollout: int, limit_s: float) -> None:
        """Prints a warning and the stack of every thread."""
        usual = statistics.median(self._seconds)
        print(
            f"warning: rollout {rollout} has taken {limit_s:.0f} s, {limit_s / max(usual, 1e-9):.0f} times the median "
            f"of {usual:.1f} s; the run continues; this is what each thread is doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def give_up(self) -> None:
        """Prints the stacks and a line, and ends the process: a hung thread cannot be stopped in any other way."""
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        print(
            f"error: no rollout or validation has finished for {self.end_s:g} s (callbacks.watchdog.end_s); above is "
            f"what each thread was doing; {resume_line(self._last)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _expect_progress(self) -> None:
        if self._end is not None:
            self._end.cancel()
        if self.end_s is not None:
            self._end = threading.Timer(self.end_s, self.give_up)
            self._end.daemon = True
            self._end.start()

    def _cancel(self) -> None:
        for timer in (self._timer, self._end):
            if timer is not None:
                timer.cancel()
        self._timer = self._end = None
