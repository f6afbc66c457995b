"""A graceful end on a signal: the current rollout is finished and saved, on all ranks together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import lightning as L

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.callbacks.requeue import requeue
from gspo_lightning.distributed.ranks import global_max
from gspo_lightning.how_to_resume import resume_line
from gspo_lightning.screen import say

_BEGINS_ANEW = "not requeued: without ckpt_path=auto it would not resume from here"


class GracefulStop(L.Callback):
    """On a signal, finishes the current rollout and saves it, if that fits ``grace_s``, and says what is saved.

    SIGINT and SIGTERM end the run. SIGUSR1 is how Slurm announces the end of a job (``sbatch --signal=USR1@120
    --requeue``): the job is requeued if rollouts are left and it would resume. SIGUSR2 is handled if a launcher has
    installed a handler for it, as submitit does to requeue the job: whoever runs the Trainer calls that handler after
    the run (`hand_over`). A signal to one of several ranks stops them all after the same rollout. A second one of the
    same kind ends the process at once; different kinds do not add up, because a scheduler may send two for one stop.
    After the last rollout SIGINT and SIGTERM end a process as any other, and SIGUSR1 only prints a line (`finishing`).
    After ``grace_s`` the process ends with code 128 plus the signal, and the previous checkpoint remains. Before the
    first rollout it ends at once (`listen`).

    Args:
        checkpoint: the callback that saves.
        grace_s: seconds for the current rollout and its checkpoint.
        goes_on: whether the job, started again, resumes from the checkpoint; if not, it is not requeued.
    """

    def __init__(self, checkpoint: RolloutCheckpoint, grace_s: float, goes_on: bool = True) -> None:
        self.checkpoint, self.grace_s, self.goes_on = checkpoint, grace_s, goes_on
        self.received: list[int] = []
        """The signals that this process received."""
        self.stopping = 0
        """Equal on all ranks after a rollout: 1 if one of them received a signal, 2 if that was SIGUSR1; else 0."""
        self.is_first_rank = True
        self._begins = False
        self._left = self._requeued = False
        self._timer: threading.Timer | None = None
        self._before: dict[int, Any] = {}
        self._launcher: Callable[[int, FrameType | None], Any] | None = None

    def listen(self, trainer: L.Trainer) -> None:
        """Handles a scheduler's signals from before training on; the caller must call `give_back` after training.

        Other signals keep their default effect until a validation or the training begins: a process that waits for
        other ranks in a library would never run a Python handler.
        """
        self._begins = True
        self._take_over(trainer, (signal.SIGUSR1, signal.SIGUSR2))

    def _take_over(self, trainer: L.Trainer, only: tuple[int, ...] = ()) -> None:
        self.is_first_rank = trainer.is_global_zero
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._before:
            handler = signal.getsignal(signal.SIGUSR2)
            self._launcher = handler if callable(handler) else None
            heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *([signal.SIGUSR2] if self._launcher else []))
            self._before = {number: signal.getsignal(number) for number in heard}
        for number in self._before:
            if not only or number in only:
                signal.signal(number, self._on_signal)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs our handlers over those of Lightning, which it has set for the validation before training."""
        if self._begins:
            self._take_over(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs our handlers for training; from here on there is a current rollout."""
        self._begins = False
        self._take_over(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If a rank received a signal, saves and stops; if a validation is due, stops after it."""
        if not self._agree(pl_module):
            return
        self.checkpoint.end(trainer, pl_module)
        if not self.checkpoint.wanted:
            self._leave(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stops after the validation of a saved rollout; the signal may have come during it."""
        if self._agree(pl_module) and self.checkpoint.saved_at == pl_module.rollouts_done:
            trainer.should_stop = True
            self._leave(pl_module)

    def _agree(self, pl_module: Any) -> bool:
        """Whether to stop here, the same on all ranks: else they would wait for each other for ever."""
        self.stopping = global_max(max(self.stopping, self._wanted), pl_module.device)
        return self.stopping > 0

    @property
    def _wanted(self) -> int:
        return 2 if signal.SIGUSR1 in self.received else int(bool(self.received))

    def _leave(self, pl_module: Any) -> None:
        """Says that the run stopped, and requeues it; acts once, as a batch and a validation may both end here."""
        self._cancel()
        if self._left:
            return
        self._left = True
        if self.is_first_rank:
            print(f"Stopped after rollout {pl_module.rollouts_done}, saved in {self.checkpoint.last}", flush=True)
        if pl_module.rollouts_done < pl_module.max_rollouts:
            self._requeue()

    def _requeue(self) -> None:
        """Requeues the Slurm job after SIGUSR1; acts once, as a second signal may come while the run ends."""
        if self._requeued or not self.is_first_rank or max(self.stopping, self._wanted) < 2:
            return
        self._requeued = True
        say(requeue() if self.goes_on else _BEGINS_ANEW)

    def hand_over(self) -> None:
        """Calls the launcher's handler of SIGUSR2, if that is what stopped the run; it may end the process."""
        if self._launcher is None or signal.SIGUSR2 not in self.received:
            return
        if not self.goes_on:
            say(_BEGINS_ANEW)
        else:
            self._launcher(signal.SIGUSR2, None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the signal handlers."""
        self.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the signal handlers and cancels the timer, which would end the next run of this process."""
        self.give_back()

    def give_back(self) -> None:
        """Restores the previous handlers. May be called again: Lightning reinstalls ours when its run is over."""
        self._cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Context of what follows the last rollout: SIGUSR1, which warns of an end, does not bring it about at once.

        It would by default, and the time that Slurm leaves may do for the export. Nothing is requeued: no rollout is
        left. A handler of the user's own stays.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGUSR1, self._on_late_warning)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    def _on_late_warning(self, number: int, frame: FrameType | None) -> None:
        if self.is_first_rank:
            resume = resume_line(self.checkpoint.last)
            say(f"SIGUSR1: all rollouts are done; finishing the export. If that is cut short, {resume}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in self.received:
            self._give_up()
        self.received.append(number)
        if self._begins:
            self._give_up()
        if len(self.received) > 1:
            return
        say(f"{signal.Signals(number).name}: finishing the current rollout (at most {self.grace_s:g} s)")
        self._timer = threading.Timer(self.grace_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        where = "before a rollout" if self._begins else "without the current rollout"
        say(f"Stopped {where}; {resume_line(self.checkpoint.last)}")
        code: Any = 128 + (self.received or [signal.SIGTERM])[0]
        try:
            self._requeue()
            self.hand_over()
        except SystemExit as wish:
            code = wish.code if isinstance(wish.code, int) else 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()  # what the launcher's handler has printed
            # The main thread may be inside a matrix product or a hung reward; its work is no longer needed.
            os._exit(code % 256)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
