"""Ctrl-C where no rollout is in hand to finish, as while a model loads or is exported: one line and exit code 130."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the line that the program ends with."""


def is_interrupt(end: BaseException) -> bool:
    """Whether Ctrl-C is why the program ends: where a Trainer is at work, Lightning makes it a ``SystemExit``."""
    cause = end.__context__ if isinstance(end, SystemExit) else end
    return isinstance(cause, KeyboardInterrupt)
