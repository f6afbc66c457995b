"""Ctrl-C where no rollout is in hand to finish, as while a model loads or is exported: one line and exit code 130."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

STOPPED = "SIGINT: stopped"
"""The line of a program that had nothing to save."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the line that the program ends with."""


def is_interrupt(end: BaseException) -> bool:
    """Whether Ctrl-C is why the program ends: where a Trainer is at work, Lightning makes it a ``SystemExit``."""
    cause = end.__context__ if isinstance(end, SystemExit) else end
    return isinstance(cause, KeyboardInterrupt)


def end_at_interrupt() -> None:
    """Makes Ctrl-C end the program with its line and code 130 while it imports, and `raise_at_interrupt` ends that.

    A program that ignores Ctrl-C, or has a handler of its own, keeps to it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_interrupt() -> None:
    """Makes Ctrl-C a ``KeyboardInterrupt`` again, for whoever catches it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def wants_traceback() -> bool:
    """Whether the command line asks for a traceback, for errors that leave no config to ask."""
    return not {"debug=traceback", "traceback=true"}.isdisjoint(sys.argv)


def is_first_started() -> bool:
    """Whether no launcher (torchrun, Lightning, srun) has started this process as a rank other than the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _end(number: int, frame: FrameType | None) -> None:
    if wants_traceback():
        traceback.print_stack(frame)
    if is_first_started():
        print(f"error: {STOPPED}", file=sys.stderr, flush=True)
    os._exit(130)  # an exception could be caught by what is being imported
