"""The prompt stream: one integer is its position, from which everything before and after follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gspo_lightning.data.tasks import Row, Task
from gspo_lightning.types import PromptBatch


@dataclass(frozen=True)
class PromptStream:
    """Rows in training order. A finite task is reshuffled in each epoch, by (seed, epoch) alone."""

    task: Task
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def row_at(self, cursor: int) -> tuple[str, Row]:
        """The uid and the row at a position of the stream."""
        size = self.task.num_train_rows
        index = cursor if size is None else self._order(self.epoch(cursor))[cursor % size]
        return f"{self.task.name}:train:{index}", self.task.train_row(index)

    def epoch(self, cursor: int) -> int:
        """Passes over a finite task completed before this position; 0 for a task that never runs out."""
        size = self.task.num_train_rows
        return 0 if size is None else cursor // size

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders[epoch] = torch.randperm(self.task.num_train_rows or 0, generator=generator).tolist()
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
        yield f"{task.name}:train:{index}", task.train_row(index)


def spaced(size: int, most: int) -> range:
    """At most ``most`` of ``size`` indices, evenly spaced."""
    return range(0, size, -(-size // most) or 1)
