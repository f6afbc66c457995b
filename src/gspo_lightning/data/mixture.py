"""Several tasks in one run, in fixed proportions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gspo_lightning.data.stream import PromptStream, spaced
from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.errors import UserError

TASK_COLUMN = "task"
"""The column in which a row of a mixture names its task."""


@dataclass(frozen=True)
class Mixture:
    """Rows of several tasks, interleaved so that every ``sum(weights)`` rows hold each task ``weight`` times.

    The row at an index is a function of (seed, index) alone: the proportions are exact, not random. A finite task
    starts again in another order at its end, so a mixture never runs out. Held-out rows are those of all tasks.
    Every row gets a column ``task`` with the name of its task: `rewards.ForTasks` reads it, and validation measures
    each task separately.

    Raises:
        UserError: names or weights do not match, a weight is no whole number above 0, or a row has a column ``task``.
    """

    tasks: dict[str, Task]
    weights: dict[str, int] | None = None
    """Task name -> rows in each round; None: one of each."""
    seed: int = 0
    """Seed of the order of rows in finite tasks."""
    name: str = "mixture"

    def __post_init__(self) -> None:
        weights = self._weights
        if not self.tasks:
            raise UserError("data.task.tasks is empty; give at least one task")
        if weights.keys() != self.tasks.keys():
            odd = sorted(weights.keys() ^ self.tasks.keys())
            raise UserError(f"data.task.weights and data.task.tasks must name the same tasks; {', '.join(odd)} do not")
        for task, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
                raise UserError(f"data.task.weights.{task}={weight!r} must be a whole number above 0")

    @property
    def num_train_rows(self) -> None:
        """None: a mixture never runs out."""
        return None

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, for the metrics of each task."""
        return tuple(self.tasks)

    def train_row(self, index: int) -> Row:
        """The next row of the task whose turn it is at ``index``."""
        rounds, place = divmod(index, len(self._turns))
        task, earlier = self._turns[place]
        _, row = self._streams[task].row_at(rounds * self._weights[task] + earlier)
        return _marked(row, task)

    def validation_rows(self) -> list[Row]:
        """The held-out rows of every task, one task after the other."""
        return [_marked(row, name) for name, task in self.tasks.items() for row in task.validation_rows()]

    def spaced_rows(self, most: int) -> Iterator[tuple[str, Row]]:
        """Uid and row of the rows to check before a run, each with its number in its task.

        About ``most`` in all: an equal share of each finite task (at least one row), the first row of an endless one.
        """
        share = max(1, most // len(self.tasks))
        for name, task in self.tasks.items():
            for index in spaced(1 if task.num_train_rows is None else task.num_train_rows, share):
                yield f"{self.name}.{name}:train:{index}", _marked(task.train_row(index), name)

    @property
    def _weights(self) -> dict[str, int]:
        return dict.fromkeys(self.tasks, 1) if self.weights is None else self.weights

    @cached_property
    def _streams(self) -> dict[str, PromptStream]:
        return {name: PromptStream(task, self.seed) for name, task in self.tasks.items()}

    @cached_property
    def _turns(self) -> list[tuple[str, int]]:
        """One round: (task, number of its rows earlier in the round), each task spread as evenly as possible.

        Row k (from 0) of a task's w rows is at ``(k + 1/2) / w`` of the round.
        """
        weights = self._weights
        places = [((2 * k + 1) / (2 * w), task, k) for task, w in weights.items() for k in range(w)]
        return [(task, k) for _, task, k in sorted(places, key=lambda place: place[0])]


def _marked(row: Row, task: str) -> dict[str, Any]:
    if TASK_COLUMN in row:
        raise UserError(
            f"a row of task {task} has a column {TASK_COLUMN!r}, which the mixture itself uses; rename that column"
        )
    return {**row, TASK_COLUMN: task}
