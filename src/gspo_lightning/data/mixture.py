"""Several tasks in one run, in fixed proportions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch

from gspo_lightning.data.stream import PromptStream, spaced, train_row, validation_rows
from gspo_lightning.data.tasks import Endless, Row, Task
from gspo_lightning.errors import UserError

TASK_COLUMN = "task"
"""The column in which a row of a mixture names its task."""
_FAR = 1_000_000_000_039
"""More than the rows that any run takes of a task; a prime, as rows may repeat in some period."""


@dataclass(frozen=True)
class Mixture(Endless):
    """Rows of several tasks, interleaved so that every ``sum(weights)`` rows hold each task ``weight`` times.

    The row at an index is a function of (seed, index) alone: the proportions are exact, not random, also where rows are
    left out because their prompts are too long: another row of the task takes the place (`substitutes`). A finite task
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
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, for the metrics of each task."""
        return tuple(self.tasks)

    def train_row(self, index: int) -> Row:
        """The next row of the task whose turn it is at ``index``."""
        task, position = self._turn(index)
        _, row = self._streams[task].row_at(position)
        return _marked(row, task)

    def substitutes(self, index: int) -> Iterator[Row]:
        """Further rows of the task whose turn it is at ``index``, for one that is left out: its place stays its task's.

        They are functions of (seed, index) too: of a finite task, others of its epoch in a random order, so that a row
        that is taken comes once more in it; of an endless one, rows that come nowhere else.
        """
        task, position = self._turn(index)
        size = self.tasks[task].num_train_rows
        if size is None:
            positions: Iterable[int] = (position + number * _FAR for number in count(1))
        else:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + index))
            begin = position - position % size
            positions = (begin + place for place in order.tolist())
        return (_marked(self._streams[task].row_at(other)[1], task) for other in positions if other != position)

    def _turn(self, index: int) -> tuple[str, int]:
        """The task whose turn it is at ``index``, and the number of its turns before."""
        rounds, place = divmod(index, len(self._turns))
        task, earlier = self._turns[place]
        return task, rounds * self._weights[task] + earlier

    def validation_rows(self) -> list[Row]:
        """The held-out rows of every task, one task after the other."""
        return [_marked(row, name) for name, task in self.tasks.items() for row in validation_rows(task)]

    def spaced_rows(self, most: int) -> Iterator[tuple[str, Row]]:
        """Uid and row of the rows to check before a run, each with its number in its task.

        About ``most`` in all: an equal share of each finite task (at least one row), the first row of an endless one.
        """
        share = max(1, most // len(self.tasks))
        for name, task in self.tasks.items():
            for index in spaced(1 if task.num_train_rows is None else task.num_train_rows, share):
                uid = f"{self.name}.{name}:train:{index}"
                yield uid, _marked(train_row(task, index, uid), name)

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
    if not isinstance(row, Mapping):
        raise UserError(f"a row of task {task} is of type {type(row).__name__}; return a dict with the column prompt")
    if TASK_COLUMN in row:
        raise UserError(
            f"a row of task {task} has a column {TASK_COLUMN!r}, which the mixture itself uses; rename that column"
        )
    return {**row, TASK_COLUMN: task}
