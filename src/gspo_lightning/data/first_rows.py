"""The first rows of a task, repeated, to see whether a reward can rise at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from gspo_lightning.data.stream import train_row, validation_rows
from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class FirstRows:
    """A finite task of the first ``count`` training rows of another task, with that task's held-out rows.

    Where too long rows are left out, others take their places (`substitutes`).

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

    def substitutes(self, index: int) -> Iterator[Row]:
        """Further rows in the place of one that is left out, in every epoch the same: the task's own, or later ones.

        Of every ``count`` later rows one, never that of another place, and in turn, as rows may repeat in some period.
        """
        if (of_task := getattr(self.task, "substitutes", None)) is not None:
            return iter(of_task(index))
        size, step = self.task.num_train_rows, self.count
        begins = itertools.count(step, step) if size is None else range(step, size, step)
        places = (begin + (index + turn) % step for turn, begin in enumerate(begins))
        return (self.train_row(place) for place in places if size is None or place < size)

    def validation_rows(self) -> list[Row]:
        """The held-out rows of the task."""
        return validation_rows(self.task)
