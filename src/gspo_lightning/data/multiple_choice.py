"""Multiple-choice questions: a list of choices becomes lettered options, the answer becomes a letter."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from gspo_lightning.data.columns import as_mapping, column_of
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class MultipleChoice(RowsTask):
    """`RowsTask` whose rows hold a list of choices; ``{options}`` in the template is the lettered list.

    The row's ``answer`` becomes a letter, ``choices`` stays. The dataset may name the right choice by its number (from
    0), by its letter or the dataset's own label, or by its text.
    """

    template: str | None = "{question}\n{options}\nAnswer with just the letter."
    choices_column: str = "choices"
    """Column with a list of strings, ``{"A": text, "B": ...}``, or ``{"text": [...], "label": [...]}`` as in ARC."""
    answer_column: str = "answer"

    @cached_property
    def _prompt_columns(self) -> list[str]:
        return [self.choices_column if name == "options" else name for name in super()._prompt_columns]

    def _prompt_row(self, row: Row, where: str) -> Row:
        row = dict(as_mapping(row, where))
        column = column_of(row, self.choices_column, where, "data.task.choices_column")
        choices, labels = _labelled(column, f"{where}: column {self.choices_column!r}")
        answer = _plain(column_of(row, self.answer_column, where, "data.task.answer_column"))
        row["answer"] = letter_of(answer, choices, where, labels)
        row["options"] = "\n".join(f"{string.ascii_uppercase[n]}. {choice}" for n, choice in enumerate(choices))
        return super()._prompt_row(row, where)


def _labelled(column: Any, where: str) -> tuple[list[Any], list[str] | None]:
    """The choices, and the dataset's own labels of them, or None without any."""
    choices, labels = _plain(column), None
    if isinstance(column, Mapping):
        given = {str(name): _plain(item) for name, item in column.items() if item is not None}  # Arrow adds nulls
        labels = sorted(given)
        if set(given) == {"text", "label"}:
            choices, labels = given["text"], given["label"]
        elif _are_letters(labels):
            choices = [given[label] for label in labels]
        elif all(len(label) == 1 and label.upper() in string.ascii_uppercase for label in labels):
            raise UserError(
                f"{where} has choices only for {', '.join(labels)}; letters must run from A (or a) without a gap, and "
                "null is not a choice"
            )
    if not _are_choices(choices) or not (labels is None or isinstance(labels, list)):
        raise UserError(
            f"{where} must be a list of 2 to 26 choices, none of them null or a mapping, {{'A': choice, 'B': ...}}, or "
            "{'text': [choices], 'label': [labels]}"
        )
    if labels is not None and (len(labels) != len(choices) or len({*map(str, labels)}) != len(choices)):
        raise UserError(f"{where} must have one label for each choice, no two the same; found {labels}")
    return [_plain(choice) for choice in choices], None if labels is None else [str(label) for label in labels]


def _are_choices(choices: Any) -> bool:
    known = isinstance(choices, list | tuple) and 2 <= len(choices) <= 26
    return known and not any(isinstance(c, Mapping) or c is None or c != c for c in map(_plain, choices))


def _plain(value: Any) -> Any:
    """NumPy arrays and numbers, as from pandas, as Python lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _are_letters(labels: list[str]) -> bool:
    return [label.upper() for label in labels] == list(string.ascii_uppercase[: len(labels)])


def letter_of(answer: Any, choices: list[Any], where: str, labels: list[str] | None = None) -> str:
    """The letter of the right choice, which the dataset may name by its own label.

    Raises:
        UserError: the answer is neither a number below the number of choices, nor a choice's letter, label or text, or
            it fits two choices.
    """
    texts, letters = [str(choice) for choice in choices], string.ascii_uppercase[: len(choices)]
    names = list(letters) if labels is None else labels
    text = str(answer)
    if text not in names and isinstance(answer, Integral) and not isinstance(answer, bool):
        # By value and not by text: numbers from 1 of choices that are strings would be taken for their texts.
        equal = {n for n, choice in enumerate(choices) if choice == answer and not isinstance(choice, bool)}
        found = equal | ({int(answer)} & set(range(len(choices))))
        if len(found) > 1:
            raise UserError(
                f"{where}: the answer {answer!r} is both the number (from 0) of a choice and another choice; give its "
                "letter"
            )
        if found:
            return letters[found.pop()]
    elif texts.count(text) == 1:
        if text in names and names.index(text) != texts.index(text):
            raise UserError(
                f"{where}: the answer {answer!r} is both a letter and the text of another choice; give its number"
            )
        return letters[texts.index(text)]
    elif text in names:
        return letters[names.index(text)]
    raise UserError(
        f"{where}: the answer {answer!r} is not the number (from 0), letter or text of one of the {len(texts)} choices"
    )
