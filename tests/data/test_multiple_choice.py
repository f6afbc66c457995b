"""Choices become lettered options and the answer a letter, however the dataset names it."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf

from gspo_lightning.config.build import build
from gspo_lightning.data import MultipleChoice
from gspo_lightning.errors import UserError
from tests.conf.test_groups import composed

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
    ("choices", "answer"),
    [
        ({"A": "red", "B": "green", "C": "blue"}, "B"),
        ({"C": "blue", "B": "green", "A": "red", "D": None}, "B"),
        ({"A": "red", "B": "green", "C": "blue"}, "green"),
        ({"a": "red", "b": "green", "c": "blue"}, "b"),
        ({"text": COLOURS, "label": ["A", "B", "C"]}, "B"),
        ({"text": COLOURS, "label": ["1", "2", "3"]}, "2"),
        ({"text": COLOURS, "label": [1, 2, 3]}, 2),
        ({"text": COLOURS, "label": ["x", "y", "z"]}, 1),
        (np.array(COLOURS), np.int64(1)),
        (tuple(COLOURS), 1),
        ({"text": np.array(COLOURS), "label": np.array(["A", "B", "C"])}, "B"),  # of pandas, from a Parquet file
        ({"text": np.array(COLOURS), "label": np.array([7, 8, 9])}, np.int64(8)),
    ],
)
def test_choices_of_a_mapping_are_read_with_the_labels_of_the_dataset(choices, answer):
    for row in rows_of(task(*[{"choices": choices, "answer": answer}] * 2)):
        assert row["answer"] == "B"
        assert row["prompt"][0]["content"].endswith("?\nA. red\nB. green\nC. blue\nAnswer with just the letter.")


@pytest.mark.parametrize(
    ("choices", "answer", "options"),
    [
        ([[1, 2], [3, 4]], [3, 4], "A. [1, 2]\nB. [3, 4]"),
        ([np.array([1, 2]), np.array([3, 4])], np.array([3, 4]), "A. [1, 2]\nB. [3, 4]"),
        (np.array([[1, 2], [3, 4]]), 1, "A. [1, 2]\nB. [3, 4]"),
        ([Decimal("1.50"), Decimal("2")], Decimal("2"), "A. 1.50\nB. 2"),
        ([date(2020, 1, 2), date(2021, 1, 2)], date(2021, 1, 2), "A. 2020-01-02\nB. 2021-01-02"),
        ([np.int64(5), np.int64(6)], "6", "A. 5\nB. 6"),
        ([5, 6], 6, "A. 5\nB. 6"),
        ([0, 1], 1, "A. 0\nB. 1"),
        (["1", "2"], 1, "A. 1\nB. 2"),
        ([True, False], 1, "A. True\nB. False"),
        ([np.float32(1.5), np.float64(2)], 1, "A. 1.5\nB. 2.0"),
        ({"A": True, "B": ["x"]}, "B", "A. True\nB. ['x']"),
    ],
)
def test_a_choice_is_whatever_can_be_written_out(choices, answer, options):
    for row in rows_of(task(*[{"choices": choices, "answer": answer}] * 2)):
        assert row["answer"] == "B"
        assert row["prompt"][0]["content"].endswith(f"?\n{options}\nAnswer with just the letter.")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_letters_and_lists_of_a_file_are_choices(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, choices in [
        ("letters", {"A": "sun", "B": "moon"}),
        ("arc", {"text": ["sun", "moon"], "label": ["A", "B"]}),
    ]:
        more = {"A": "x", "B": "y", "C": "z"} if name == "letters" else {"text": ["x", "y", "z"], "label": list("ABC")}
        rows = [{"question": "q?", "choices": c, "answer": "B"} for c in (choices, more)]
        data = datasets.Dataset.from_list(rows)
        path = str(tmp_path / f"{name}.{kind}")
        data.to_parquet(path) if kind == "parquet" else data.to_json(path)
        prompts = {row["prompt"][0]["content"] for row in rows_of(MultipleChoice(path, num_validation=1))}
        end = "\nAnswer with just the letter."
        assert prompts == {f"q?\nA. sun\nB. moon{end}", f"q?\nA. x\nB. y\nC. z{end}"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 3}, "the answer 3 is not the number \\(from 0\\), letter or text of one of the 3 choices"),
        ({"answer": "D"}, "the answer 'D' is not the number"),
        ({"answer": 4, "choices": list("3456")}, r"the answer 4 is not the number \(from 0\)"),
        ({"answer": True}, "the answer True is not the number"),
        ({"answer": "A", "choices": ["B", "A"]}, "both a letter and the text of another choice"),
        (
            {"answer": 2, "choices": [1, 2, 3]},
            r"row 0: the answer 2 is both the number \(from 0\) of a choice and another choice; give its letter",
        ),
        ({"answer": 0, "choices": "red"}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": ["red"]}, "must be a list of 2 to 26 choices"),
        (
            {"answer": 0, "choices": ["red", None]},
            r"must be a list of 2 to 26 choices, none of them null or a mapping, \{'A': choice",
        ),
        ({"answer": 0, "choices": {"red", "green"}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": 5}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": ["red", float("nan")]}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": {"A": "red", "B": None}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": [{"label": "A", "text": "red"}] * 2}, "must be a list of 2 to 26 choices"),
        (
            {"answer": 0, "choices": {"A": "red", "B": None, "C": "green"}},
            r"row 0: column 'choices' has choices only for A, C; letters must run from A \(or a\) without a gap, and null",
        ),
        ({"answer": 0, "choices": {"b": "red", "c": "green"}}, "has choices only for b, c; letters"),
        ({"answer": 0, "choices": {"AB": "red", "C": "green"}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": {"red": 1, "green": 0}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": {"text": COLOURS, "label": 5}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": {"text": ["red", None], "label": ["A", "B"]}}, "must be a list of 2 to 26 choices"),
        ({"answer": 0, "choices": {"text": COLOURS, "label": ["A", "B"]}}, r"one label for each .* found \['A', 'B'\]"),
        (
            {"answer": 0, "choices": {"text": COLOURS, "label": ["A", "A", "B"]}},
            "one label for each choice, no two the same",
        ),
        ({"answer": "C", "choices": {"text": COLOURS, "label": ["x", "y", "z"]}}, "the answer 'C' is not the number"),
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


def test_questions_about_images_are_a_matter_of_settings(tmp_path):
    rows = [{"question": f"{n}?", "choices": ["a", "b"], "answer": n % 2, "photo": f"{n}.png"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = composed(
        "data=multiple_choice", f"data.task.source={tmp_path}/rows.jsonl", "data.task.num_validation=0",
        "data.task.image_columns=[photo]", "+data.task.keep_rows.photo='[13].png'",
    )  # fmt: skip
    task = build(OmegaConf.to_container(cfg.data.task, resolve=True))
    contents = [task.train_row(n)["prompt"][0]["content"] for n in range(task.num_train_rows)]
    assert contents == [
        [
            {"type": "image", "image": f"{n}.png"},
            {"type": "text", "text": f"{n}?\nA. a\nB. b\nAnswer with just the letter."},
        ]
        for n in (1, 3)
    ]
