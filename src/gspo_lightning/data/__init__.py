"""Tasks, prompts and the stream they come from."""

from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.data.easy_vqa import EasyVQA
from gspo_lightning.data.micro_tasks import MicroDigit, MicroLetters
from gspo_lightning.data.mixture import Mixture
from gspo_lightning.data.multiple_choice import MultipleChoice
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.data.tasks import Arithmetic, LargestOfFour, OnePrompt, SecretNumber, Task
from gspo_lightning.data.templating import make_prompt

__all__ = [
    "Arithmetic",
    "EasyVQA",
    "LargestOfFour",
    "MicroDigit",
    "MicroLetters",
    "Mixture",
    "MultipleChoice",
    "OnePrompt",
    "PromptDataModule",
    "RowsTask",
    "SecretNumber",
    "Task",
    "make_prompt",
]
