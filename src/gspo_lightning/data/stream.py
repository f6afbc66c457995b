"""The prompt stream: one integer is its position, from which everything before and after follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.errors import UserError, named_reason
from gspo_lightning.types import PromptBatch
from gspo_lightning.users_code import RAISED

Given = TypeVar("Given")


def asked(ask: Callable[[], Given], what: str) -> Given:
    """What a task gives; whatever one of the user's own raises becomes a line.

    Raises:
        UserError: begins with ``what``.
    """
    try:
        return ask()
    except UserError:
        raise
    except RAISED as error:
        raise UserError(f"{what} raised {named_reason(error)}") from error


def train_row(task: Task, index: int, uid: str) -> Row:
    """`Task.train_row`; what it raises is a line that begins with ``uid``."""
    return asked(lambda: task.train_row(index), f"row {uid}: {type(task).__name__}.train_row({index})")


def validation_rows(task: Task) -> list[Row]:
    """`Task.validation_rows`; what it raises is a line that names the task."""
    return asked(lambda: list(task.validation_rows()), f"task {task.name}: {type(task).__name__}.validation_rows()")


@dataclass(frozen=True)
class PromptStream:
    """Rows in training order. A finite task is reshuffled in each epoch, by (seed, epoch) alone."""

    task: Task
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def row_at(self, cursor: int) -> tuple[str, Row]:
        """The uid and the row at a position of the stream."""
        index = self.index_at(cursor)
        uid = f"{self.task.name}:train:{index}"
        return uid, train_row(self.task, index, uid)

    def index_at(self, cursor: int) -> int:
        """The number in its task of the row at a position of the stream."""
        size = self.task.num_train_rows
        return cursor if size is None else self._order(cursor // size, size)[cursor % size]

    def _order(self, epoch: int, size: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders[epoch] = torch.randperm(size, generator=generator).tolist()
        return self._orders[epoch]


class Batches(IterableDataset[PromptBatch]):
    """An iterable dataset of the batches that ``begin()`` yields, from the beginning on each pass.

    Several workers of a `DataLoader` take them in turn, which is the order in which it asks the workers.
    """

    def __init__(self, begin: Callable[[], Iterator[PromptBatch]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[PromptBatch]:
        if (worker := get_worker_info()) is None:
            return self._begin()
        return islice(self._begin(), worker.id, None, worker.num_workers)


def spaced_rows(task: Task, most: int) -> Iterator[tuple[str, Row]]:
    """Uid and row of at most ``most`` training rows of a finite task, evenly spaced, or as its `spaced_rows` yields."""
    if hasattr(task, "spaced_rows"):
        yield from task.spaced_rows(most)
        return
    for index in spaced(task.num_train_rows or 0, most):
        uid = f"{task.name}:train:{index}"
        yield uid, train_row(task, index, uid)


def spaced(size: int, most: int) -> range:
    """At most ``most`` of ``size`` indices, evenly spaced."""
    return range(0, size, -(-size // most) or 1)
