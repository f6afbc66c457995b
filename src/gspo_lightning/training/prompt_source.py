"""What a training step asks of the data beside its batches: fresh prompts, those that come next, and a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from gspo_lightning.errors import UserError
from gspo_lightning.types import PromptBatch


@runtime_checkable
class PromptSource(Protocol):
    """A data module that keeps its position in a stream of prompts, such as `gspo_lightning.PromptDataModule`.

    A cursor is a position in that stream, in prompts.
    """

    max_prompt_length: int
    """Longest prompt, in tokens."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of a mixture, which are validated separately; empty for a single task."""
        ...

    def first(self) -> PromptBatch:
        """This rank's share of the rollout after the last finished one."""
        ...

    def batch_at(self, cursor: int) -> PromptBatch:
        """This rank's share of the rollout that begins at ``cursor``."""
        ...

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch | None:
        """``counts[rank]`` fresh prompts for this rank; cursor and drops continue those of ``batch``.

        None, on all ranks, if there are not enough prompts left.
        """
        ...

    def finish(self, batch: PromptBatch) -> None:
        """Moves the position to the end of a rollout that has been trained on."""
        ...


def prompt_source(trainer: Any) -> PromptSource | None:
    """The data module of a Trainer if it is a `PromptSource`; None for loaders without a position."""
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule if isinstance(datamodule, PromptSource) else None


def needed_source(trainer: Any, setting: str) -> PromptSource:
    """The same where a setting asks for prompts itself: the loader fetches ahead, so its batches are stale.

    Raises:
        UserError: there is no `PromptSource`.
    """
    if (source := prompt_source(trainer)) is None:
        raise UserError(
            f"{setting} needs a data module that keeps its position: PromptDataModule, or one with all members of "
            "gspo_lightning.training.prompt_source.PromptSource"
        )
    return source
