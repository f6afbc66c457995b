"""Tasks, prompts and the stream they come from."""

from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.data.tasks import LargestOfFour, MicroLetters, Task

__all__ = ["LargestOfFour", "MicroLetters", "PromptDataModule", "RowsTask", "Task"]
