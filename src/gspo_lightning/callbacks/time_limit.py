"""``trainer.max_time``: the limit of one process, not of a chain of resumed runs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from gspo_lightning.errors import UserError


class TimeLimit(Timer):
    """Ends a run after the rollout in which ``duration`` is over.

    Lightning's `Timer` adds up the time of resumed runs: the second job of a Slurm chain, and every later one, would
    end before its first rollout.

    Args:
        duration: ``"DD:HH:MM:SS"``, a `datetime.timedelta`, or the arguments of one; above 0.
    """

    def __init__(self, duration: str | timedelta | dict[str, int]) -> None:
        try:
            super().__init__(duration)
        except (MisconfigurationException, TypeError, OverflowError) as error:
            raise UserError(f"trainer.max_time={duration!r}: {error}") from error
        if not self.time_remaining() > 0:  # type: ignore[operator]
            raise UserError(f"trainer.max_time={duration!r} must be above 0")

    @property
    def state_key(self) -> str:
        """Key of Lightning's `Timer`, whose state older checkpoints hold."""
        return "Timer"

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignores the saved state: the clock starts at zero."""
