"""``trainer.max_time``: the limit of one process, not of all that go on from each other."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Timer


class TimeLimit(Timer):
    """Ends a run behind the rollout in which ``duration`` is over.

    Lightning's own adds up the time of the runs that a run goes on from: the second job of a Slurm chain would end
    before its first rollout, and so would every later one.

    Args:
        duration: ``"DD:HH:MM:SS"``, a `datetime.timedelta`, or the arguments of one.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's own, whose state older checkpoints hold."""
        return "Timer"

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The clock begins anew."""
