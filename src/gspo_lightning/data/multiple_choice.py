"""Multiple-choice questions: a list of choices becomes lettered options, and the answer a letter."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gspo_lightning.data.columns import as_mapping, column_of
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class MultipleChoice(RowsTask):
    """`RowsTask` whose rows hold a list of choices; ``{options}`` in the template is the lettered list.

    ``answer`` of the row becomes a letter, ``choices`` stays. The dataset may name the right choice by its number (from
    0), by its letter, or by its text.
    """

    template: str | None = "{question}\n{options}\nAnswer with just the letter."
    choices_column: str = "choices"
    """A list of strings."""
    answer_column: str = "answer"

    @cached_property
    def _prompt_columns(self) -> list[str]:
        return [self.choices_column if name == "options" else name for name in super()._prompt_columns]

    def _prompt_row(self, row: Row, where: str) -> Row:
        row = dict(as_mapping(row, where))
        choices = column_of(row, self.choices_column, where, "data.task.choices_column")
        if isinstance(choices, str) or not 2 <= len(choices) <= 26:
            raise UserError(f"{where}: column {self.choices_column!r} must be a list of 2 to 26 choices")
        answer = column_of(row, self.answer_column, where, "data.task.answer_column")
        row["answer"] = letter_of(answer, list(choices), where)
        row["options"] = "\n".join(f"{string.ascii_uppercase[n]}. {choice}" for n, choice in enumerate(choices))
        return super()._prompt_row(row, where)


def letter_of(answer: Any, choices: list[Any], where: str) -> str:
    """The letter of the right choice.

    Raises:
        UserError: the answer is neither a number below the count of choices, nor a letter of one, nor one of them, or
            it could be two of them.
    """
    texts = [str(choice) for choice in choices]
    letters = string.ascii_uppercase[: len(texts)]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(texts):
            return letters[answer]
    elif texts.count(str(answer)) == 1:
        found = letters[texts.index(str(answer))]
        if str(answer) in letters and found != answer:
            raise UserError(
                f"{where}: the answer {answer!r} is both a letter and the text of another choice; give its number"
            )
        return found
    elif str(answer) in letters:
        return str(answer)
    raise UserError(f"{where}: the answer {answer!r} is no number from 0, letter or text of the {len(texts)} choices")
