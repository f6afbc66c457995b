"""Ends a rank that waits for a failed one, whatever it waits in.

Gloo raises if a rank is gone, and `gspo_lightning.program.ending` then ends the process with the error that rank has
noted. NCCL waits until the strategy's ``timeout``, and a process outside a collective until its work is done: this
module ends them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_lightning.distributed import first_error
from gspo_lightning.lightning_private import change_kill

POLL_S = 0.5
GRACE_S = 5.0
"""Seconds after another rank's failure in which a process may end by itself."""
_STARTER = "GSPO_LIGHTNING_STARTER"
_STARTED = "hydra.job.name=train_ddp_process_"
_watch: RankWatch | None = None


class RankWatch:
    """A thread that ends this process after another rank has failed, or after the rank that started it has died.

    It prints the first error and ends with that error's exit code. A note that existed before is of another run, unless
    rank 0 started this process: it removes those of other runs first, and may have failed since.

    Args:
        folder: of the run, where the first error is noted.
        before_end: called before such an end; its errors are ignored.
        starter: process id of the rank that started this one; None if no rank did.
    """

    def __init__(self, folder: Path, before_end: Callable[[], None], starter: int | None = None) -> None:
        self._folder, self._before_end, self._starter = folder, before_end, starter
        by_rank_0 = starter is not None and os.environ.get("NODE_RANK", "0") == "0"
        self._before = None if by_rank_0 else first_error.read(folder)
        self._over, self._ending = threading.Event(), threading.Lock()
        threading.Thread(target=self._run, name="rank-watch", daemon=True).start()

    def stop(self) -> None:
        """Stops watching: from here on the process ends by itself."""
        with self._ending:  # never released once it ends the process
            self._over.set()

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            change_kill(self._patient)
            note = self._note()
            if (note is not None or self._is_orphan()) and not self._over.wait(GRACE_S):
                self._end(note or self._note())

    def _note(self) -> dict[str, Any] | None:
        note = first_error.read(self._folder)
        return None if note is None or note == self._before or first_error.is_own(note) else note

    def _patient(self, kill: Callable[[], None]) -> Callable[[], None]:
        """Lightning's kill of a rank whose child rank failed, but not before that rank could print the error.

        Without a note there is nothing to print, and it comes at once. A rank that has failed itself ends by itself,
        which may take long: loggers upload what they have; and the other ranks watch too.
        """

        def wait_and_kill() -> None:
            note = first_error.read(self._folder)
            if note is not None and note != self._before and first_error.is_own(note):
                return
            if self._note() is not None:
                time.sleep(2 * GRACE_S)
            kill()

        return wait_and_kill

    def _is_orphan(self) -> bool:
        return self._starter is not None and os.getppid() != self._starter

    def _end(self, note: dict[str, Any] | None) -> None:
        line, code = first_error.told(note)
        with self._ending:
            if self._over.is_set():
                return
            print(f"error: {line}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                self._before_end()
            # The main thread may wait for the rank that is gone.
            os._exit(code)


def begin(folder: Path, before_end: Callable[[], None] = lambda: None) -> None:
    """Watches the other ranks of the run in ``folder`` from now on, if there are any; see `RankWatch`."""
    global _watch
    stop()
    if first_error.several_ranks():
        _watch = RankWatch(folder, before_end, _starter())


def stop() -> None:
    """Stops watching: the work of this rank is done or has failed, and the process will end by itself."""
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def _starter() -> int | None:
    """Process id of the rank whose Trainer started this process; None if srun, torchrun or a shell did.

    A rank leaves its process id in the environment for the ranks it starts.
    """
    starter = os.environ.get(_STARTER)
    if starter is not None and any(text.startswith(_STARTED) for text in sys.argv):
        # With a launcher in between, that rank's death would not show here, unless it has died already.
        return int(starter) if os.getppid() == int(starter) or not _is_alive(int(starter)) else None
    os.environ[_STARTER] = str(os.getpid())
    return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # somebody else's
        return True
    except ProcessLookupError:
        return False
    # A dead one keeps its id until its parent asks for its exit status, as a sweep does after the last rank has ended.
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:  # no Linux, or gone by now
        return True
