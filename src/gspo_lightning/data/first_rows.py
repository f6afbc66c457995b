"""The first rows of a task, repeated, to see whether a reward can rise at all."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_lightning.data.stream import train_row, validation_rows
from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class FirstRows:
    """A finite task of the first ``count`` training rows of another task, with that task's held-out rows.

    Raises:
        UserError: the task has fewer rows, or ``count`` is less than 1.
    """

    task: Task
    count: int

    def __post_init__(self) -> None:
        size = self.task.num_train_rows
        if self.count < 1 or (size is not None and size < self.count):
            raise UserError(f"overfit_rows={self.count} must be between 1 and the task's {size} training rows")

    @property
    def name(self) -> str:
        """Name of the task, part of every uid."""
        return self.task.name

    @property
    def num_train_rows(self) -> int:
        """Number of training rows: ``count``."""
        return self.count

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of a `Mixture`, which are validated separately; empty for a single task."""
        return getattr(self.task, "task_names", ())

    def train_row(self, index: int) -> Row:
        """Row ``index`` of the task."""
        return train_row(self.task, index, f"{self.name}:train:{index}")

    def validation_rows(self) -> list[Row]:
        """The held-out rows of the task."""
        return validation_rows(self.task)
