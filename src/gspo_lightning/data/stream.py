"""The prompt stream: one integer says where it stands, and everything before and after follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from gspo_lightning.data.tasks import Row, Task


@dataclass(frozen=True)
class PromptStream:
    """Rows in training order. A finite task is shuffled anew each epoch by a function of (seed, epoch)."""

    task: Task
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_permutation", lru_cache(maxsize=2)(self._shuffle))

    def row_at(self, cursor: int) -> tuple[str, Row]:
        """The name and the row at a position of the stream."""
        size = self.task.num_train_rows
        if size is None:
            return f"{self.task.name}:train:{cursor}", self.task.train_row(cursor)
        epoch, place = divmod(cursor, size)
        index = self._permutation(epoch)[place]  # type: ignore[attr-defined]
        return f"{self.task.name}:train:{index}", self.task.train_row(index)

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.task.num_train_rows, generator=generator).tolist()  # type: ignore[no-any-return]
