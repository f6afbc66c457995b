"""Choices become lettered options and the answer a letter, however the dataset names it."""

from __future__ import annotations

import pytest

from gspo_lightning.data import MultipleChoice
from gspo_lightning.errors import UserError

COLOURS = ["red", "green", "blue"]


def task(*rows):
    rows = [{"question": f"{n}?", "choices": COLOURS, **row} for n, row in enumerate(rows)]
    return MultipleChoice(rows, num_validation=1)


def rows_of(task):
    return [*task.validation_rows(), *(task.train_row(i) for i in range(task.num_train_rows))]


@pytest.mark.parametrize("answer", [1, "B", "green"])
def test_number_letter_and_text_name_the_same_choice(answer):
    for row in rows_of(task({"answer": answer}, {"answer": answer})):
        assert row["answer"] == "B"
        text = row["prompt"][0]["content"]
        assert text.endswith("?\nA. red\nB. green\nC. blue\nAnswer with just the letter.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 3}, "the answer 3 is no number from 0, letter or text of the 3 choices"),
        ({"answer": "D"}, "the answer 'D' is no number"),
        ({"answer": True}, "the answer True is no number"),
        ({"answer": "A", "choices": ["B", "A"]}, "both a letter and the text of another choice"),
        ({"answer": 0, "choices": "red"}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": ["red"]}, "must be a list of 2 to 26 choices"),
        ({}, r"column 'answer' is missing \(data.task.answer_column\)"),
        ({"answer": 0, "choices": None}, "column 'choices' is null"),
    ],
)
def test_a_row_that_cannot_be_a_question_is_named(row, message):
    with pytest.raises(UserError, match=message):
        rows_of(task(row, row))


def test_the_same_question_with_the_same_choices_is_not_trained_on_when_held_out():
    same = [{"question": "x?", "choices": COLOURS, "answer": 0}] * 2
    with pytest.raises(UserError, match="every row has a held-out prompt"):
        _ = MultipleChoice(same, num_validation=1).num_train_rows
