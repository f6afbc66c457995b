"""Tasks that may have a state, and the batch that is made when it is needed and not when it is fetched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from gspo_lightning.data.first_rows import FirstRows
from gspo_lightning.data.mixture import Mixture
from gspo_lightning.data.tasks import Task
from gspo_lightning.types import Prompt, PromptBatch


def tasks_within(task: Task, key: str) -> dict[str, Any]:
    """The task and those that a `Mixture` or `FirstRows` takes its rows from, by their keys in a config."""
    found: dict[str, Any] = {key: task}
    if isinstance(task, FirstRows):
        found |= tasks_within(task.task, f"{key}.task")
    if isinstance(task, Mixture):
        for name, inner in task.tasks.items():
            found |= tasks_within(inner, f"{key}.tasks.{name}")
    return found


class BatchWhenRead(PromptBatch):
    """A batch that is made when it is first read.

    Lightning fetches a batch before the rollout before it has ended. A task with a state would make its rows too early,
    and a checkpoint would hold a state that has already moved on; a row that cannot be made would cost that rollout.

    Args:
        make: makes the batch.
    """

    def __init__(self, make: Callable[[], PromptBatch]) -> None:
        self._make = make

    @property
    def is_made(self) -> bool:
        """Whether somebody has read it."""
        return "_made" in vars(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is made: a worker of a `DataLoader` makes what it sends."""
        return PromptBatch, (self.prompts, self.cursor, self.dropped)

    @cached_property
    def _made(self) -> PromptBatch:
        made = self._make()
        del self._make  # it may hold the batch before this one
        return made

    @property
    def prompts(self) -> list[Prompt]:  # type: ignore[override]
        """This rank's share of the rollout."""
        return self._made.prompts

    @property
    def cursor(self) -> int:  # type: ignore[override]
        """Position of the prompt stream after this batch."""
        return self._made.cursor

    @property
    def dropped(self) -> int:  # type: ignore[override]
        """Prompts left out of this batch because they are too long, over all ranks."""
        return self._made.dropped
