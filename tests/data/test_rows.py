"""Rows of files and lists: columns, templates, held-out rows, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from gspo_lightning.data import RowsTask
from gspo_lightning.data import rows as rows_module
from gspo_lightning.data.columns import check_columns
from gspo_lightning.data.images import load_image
from gspo_lightning.errors import UserError


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(count)]


def _answers(task: RowsTask) -> tuple[set[str], set[str]]:
    train = {task.train_row(i)["answer"] for i in range(task.num_train_rows)}
    return train, {row["answer"] for row in task.validation_rows()}


def test_every_row_is_either_trained_on_or_held_out() -> None:
    train, held_out = _answers(RowsTask(_rows(50), num_validation=12))
    assert len(held_out) == 12 and train | held_out == {str(i) for i in range(50)} and not train & held_out
    assert held_out != {str(i) for i in range(12)}  # not the head of a file that may be sorted
    assert _answers(RowsTask(_rows(50), num_validation=12))[1] == held_out


def test_a_training_row_with_a_held_out_prompt_is_left_out_and_said() -> None:
    doubled = [*_rows(20), *_rows(20)]
    task = RowsTask(doubled, num_validation=4)
    with pytest.warns(UserWarning, match=r"4 training rows of rows are left out") as said:
        train, held_out = _answers(task)
    assert said[0].filename == rows_module.__file__  # of functools, it would be shown with a line of its code
    assert len(held_out) == 4 and not train & held_out and task.num_train_rows == 2 * 16


def _left(tmp_path: Path, train: str, held_out: Any, **settings: Any) -> list[Any]:
    """The answers of training rows that are left, where the held-out rows are in a file of another kind."""
    import datasets

    (tmp_path / "train.jsonl").write_text(train)
    path = tmp_path / "test.parquet"
    datasets.Dataset.from_list(held_out).to_parquet(path)
    task = RowsTask(str(tmp_path / "train.jsonl"), validation_split=str(path), num_validation=None, **settings)
    with pytest.warns(UserWarning, match="training rows of .* are left out"):
        return [task.train_row(i)["answer"] for i in range(task.num_train_rows)]


def test_a_held_out_conversation_is_left_out_whatever_the_order_of_keys_and_nulls_of_arrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    talks = [[{"role": "user", "content": f"q{i}"}] for i in range(4)]
    train = "".join(json.dumps({"prompt": talk, "answer": i}) + "\n" for i, talk in enumerate(talks))
    held_out = [
        {"prompt": [{"content": "q0", "role": "user", "name": None}]},
        {"prompt": [{"content": "q2", "role": "user", "name": None}]},
        {"prompt": [{"content": "q3", "role": "user", "name": "bob"}]},
    ]
    assert _left(tmp_path, train, held_out) == [1, 3]


def test_a_held_out_number_is_the_same_as_its_text_in_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    train = "".join(json.dumps({"a": str(i), "b": i, "answer": i}) + "\n" for i in range(3))
    assert _left(tmp_path, train, [{"a": 1, "b": "1"}], template="{a}+{b}?") == [0, 2]


def test_a_column_that_no_reward_function_gets_is_said_unless_it_has_another_name_too() -> None:
    rows = [{"prompts": f"{n}?", "completions": [n], "trainer_state": n, "environment_reward": n} for n in range(3)]
    settings: dict[str, Any] = {"prompt_column": "prompts", "columns": {"state": "trainer_state"}, "num_validation": 1}
    with pytest.warns(UserWarning) as said:
        assert RowsTask(rows, **settings).num_train_rows == 2
    assert [str(warning.message) for warning in said] == [
        "rows: reward functions do not get the column completions, since completions is an argument that they have "
        "anyway; '+data.task.columns={my_completions: completions}' gives it another name"
    ]


def test_without_duplicates_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RowsTask(_rows(9), num_validation=3).num_train_rows == 6


def test_held_out_rows_can_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in _rows(5)))
    test.write_text("".join(json.dumps({"prompt": f"new {i}", "answer": f"n{i}"}) + "\n" for i in range(30)))
    task = RowsTask(str(train), validation_split=str(test), num_validation=None)
    assert _answers(task) == ({str(i) for i in range(5)}, {f"n{i}" for i in range(30)})
    assert len(RowsTask(str(train), validation_split=str(test), num_validation=7).validation_rows()) == 7


def test_of_a_file_no_split_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(5)))
    with pytest.raises(UserError, match=r"validation_split=test: the source has no splits; name a file"):
        RowsTask(str(path), validation_split="test", num_validation=2).train_row(0)


def test_of_a_dataset_of_the_hub_the_configuration_and_both_splits_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load(source: str, config_name: str, split: str) -> datasets.Dataset:
        asked.append((source, config_name, split))
        return datasets.Dataset.from_list([{"prompt": f"{split} {i}", "answer": f"{split}{i}"} for i in range(4)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = RowsTask("one/set", split="part", config_name="main", validation_split="test", num_validation=3)
    train, held_out = _answers(task)
    assert train == {f"part{i}" for i in range(4)}
    assert len(held_out) == 3 and held_out < {f"test{i}" for i in range(4)}
    assert sorted(asked) == [("one/set", "main", "part"), ("one/set", "main", "test")]
    wrong = RowsTask("one/set", split="part", validation_split="test", num_validation=1, prompt_column="q")
    for ask in (wrong.validation_rows, lambda: wrong.train_row(0)):
        with pytest.raises(UserError, match=r"^test row [0-3]: column 'q' is missing"):
            ask()


def test_a_datasets_object_serves_as_source_and_as_validation_rows() -> None:
    import datasets

    task = RowsTask(datasets.Dataset.from_list(_rows(10)), num_validation=3)
    train, held_out = _answers(task)
    assert len(held_out) == 3 and train | held_out == {str(i) for i in range(10)}


def test_an_iterable_dataset_is_read_like_a_generator() -> None:
    import datasets

    task = RowsTask(datasets.Dataset.from_list(_rows(10)).to_iterable_dataset(), num_validation=3)
    assert task.num_train_rows == 7


def test_what_has_no_rows_in_order_is_refused_with_the_way_out() -> None:
    import datasets
    import pandas

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(_rows(3))})
    for source, message in [
        (splits, r"data\.task\.source of task rows is a DatasetDict of train; give one of them"),
        (pandas.DataFrame(_rows(3)), r"is a DataFrame; give its rows: frame\.to_dict\('records'\)"),
        (["a.jsonl", "b.jsonl"], r"is a list of files, such as a\.jsonl; give one, or the folder that holds them"),
        (5, r"is a int; give a path"),
    ]:
        with pytest.raises(UserError, match=message):
            RowsTask(source, num_validation=0).train_row(0)


class Failing:
    """Rows as of a ``Dataset`` of torch, one of which cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, str]:
        if index == 4:
            raise self.error
        return {"prompt": f"q{index}"}


def test_what_rows_of_ones_own_raise_is_one_line_with_the_row() -> None:
    """An IndexError too, which would end a loop over the rows."""
    for error in (OSError("no\nsuch scan"), IndexError("scan 4")):
        for settings in ({"num_validation": 2}, {"num_validation": 0}, {"keep_rows": {"prompt": "q.*"}}):
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            with pytest.raises(UserError) as refused:
                task = RowsTask(Failing(error), **{"num_validation": 1, **settings})
                [task.train_row(index) for index in range(task.num_train_rows)]
            assert str(refused.value) == (f"data.task.source of task rows: row 4: Failing.__getitem__(4) raised {said}")
    assert len(RowsTask(Failing(OSError()), num_validation=0).train_row(3)["prompt"]) == 1

    def broken() -> Iterator[dict[str, str]]:
        yield {"prompt": "q"}
        raise ValueError("half a file")

    with pytest.raises(UserError, match="^data.task.source of task rows: the iteration of generator raised ValueError"):
        RowsTask(broken(), num_validation=0).train_row(0)


def test_rows_of_python_are_kept_by_their_columns_like_those_of_a_file() -> None:
    import datasets

    rows = [{"prompt": f"q{i}", "answer": str(i % 2)} for i in range(10)]
    for source in (rows, datasets.Dataset.from_list(rows)):
        task = RowsTask(source, num_validation=2, keep_rows={"answer": "1"})
        assert task.num_train_rows == 3 and _answers(task) == ({"1"}, {"1"})
    with pytest.raises(UserError, match="rows row 0: expected a row with columns, found str"):
        RowsTask(["p"], num_validation=0, keep_rows={"answer": "1"}).train_row(0)


def test_a_column_may_be_blank_and_is_refused_where_a_reward_needs_it() -> None:
    row = {"q": "Why?", "context": "", "solution": " "}
    task = RowsTask([row], num_validation=0, template="{hint}{q}", columns={"hint": "context"})
    assert task.train_row(0)["prompt"] == [{"role": "user", "content": "Why?"}]
    renamed = RowsTask([row], num_validation=0, prompt_column="q", columns={"answer": "solution"}).train_row(0)
    assert renamed["answer"] == " "
    with pytest.raises(UserError, match="row x: column 'answer' is blank, which reward exact_match needs"):
        check_columns(renamed, {"answer": "reward exact_match"}, "row x")
    with pytest.raises(UserError, match=r"column 'solution' is null \(data\.task\.columns\.answer\)"):
        RowsTask(
            [{"q": "Why?", "solution": None}], num_validation=0, prompt_column="q", columns={"answer": "solution"}
        ).train_row(0)


def test_a_dataset_object_has_the_names_of_its_classes_and_its_images_as_bytes() -> None:
    features = datasets.Features(
        {"q": datasets.Value("string"), "c": datasets.ClassLabel(names=["neg", "pos"]), "i": datasets.Image()}
    )
    images = [Image.new("RGB", (4, 4), (40 * n, 0, 0)) for n in (0, 0, 1, 2, 3, 4)]
    rows = datasets.Dataset.from_dict({"q": ["same"] * 6, "c": [1, 0, -1, 1, 1, 1], "i": images}, features=features)
    task = RowsTask(rows, num_validation=5, prompt_column="q", image_columns=["i"])
    assert {row["c"] for row in [*task.validation_rows(), task.train_row(0)]} <= {"pos", "neg", None}
    with pytest.raises(UserError, match="every row has a held-out prompt; nothing is left"):
        RowsTask(rows.select([0, 1]), num_validation=1, prompt_column="q", image_columns=["i"]).train_row(0)


def test_a_generator_serves_as_source_and_is_read_once() -> None:
    task = RowsTask((row for row in _rows(10)), num_validation=3)
    assert task.num_train_rows == 7
    assert [task.train_row(i) for i in range(7)] == [task.train_row(i) for i in range(7)]


def test_columns_patterns_template_and_system_prompt_make_the_prompt() -> None:
    source = [{"q": f"What is {i} + 1?", "solution": f"Add one.\n#### {i + 1}"} for i in range(3)]
    task = RowsTask(
        source,
        num_validation=0,
        template="{q}\nNumber {{only}}.",
        columns={"answer": "solution"},
        patterns={"answer": r"####\s*(\S+)"},
        system_prompt="Be brief.",
    )
    row = task.train_row(1)
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?\nNumber {only}."},
    ]
    assert row["answer"] == "2" and row["solution"] == "Add one.\n#### 2"


def test_a_row_is_made_of_the_dataset_as_it_is_and_changes_nothing_in_it() -> None:
    """New columns may exchange names, and a row that is asked for again is the same."""
    source = [{"prompt": "x = #1", "answer": "y = #2"}]
    task = RowsTask(
        source, num_validation=0, columns={"prompt": "answer", "answer": "prompt"}, patterns={"answer": r"#(\d)"}
    )
    for _ in range(2):
        assert task.train_row(0) == {"prompt": [{"role": "user", "content": "y = #2"}], "answer": "1"}
    assert source == [{"prompt": "x = #1", "answer": "y = #2"}]


def test_plain_prompts_stay_strings_and_conversations_lose_their_nulls() -> None:
    plain = RowsTask([{"prompt": "a:"}], num_validation=0, conversational=False)
    assert plain.train_row(0)["prompt"] == "a:"
    talk = [{"role": "user", "content": "hello", "name": None}]
    assert RowsTask([{"prompt": talk}], num_validation=0).train_row(0)["prompt"] == [
        {"role": "user", "content": "hello"}
    ]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ([], {}, r"data\.task\.source of task rows: the dataset is empty"),
        (
            [{"question": "q"}],
            {},
            r"rows row 0: column 'prompt' is missing \(data\.task\.prompt_column\); the row has question",
        ),
        ([{"prompt": None}], {}, r"rows row 0: column 'prompt' is null"),
        ([{"prompt": " \n"}], {}, r"rows row 0: the prompt is empty"),
        ([{"prompt": []}], {}, r"rows row 0: the prompt must be a string or a list of messages"),
        ([{"prompt": 5}], {}, r"rows row 0: the prompt must be a string or a list of messages"),
        ([{"prompt": [{"role": "user", "content": ""}]}], {}, r"rows row 0: the prompt is empty"),
        (
            [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]}],
            {},
            r"rows row 0: the last message is the assistant's",
        ),
        (
            [{"prompt": "p"}],
            {"columns": {"answer": "solution"}},
            r"column 'solution' is missing \(data\.task\.columns\.answer\)",
        ),
        (
            [{"prompt": "p", "a": "none"}],
            {"patterns": {"a": "#(.*)"}},
            r"rows row 0: column 'a' does not match",
        ),
        (
            [{"prompt": "p", "a": "none"}],
            {"patterns": {"a": "#.*"}},
            r"put parentheses around the part to keep",
        ),
        (
            [{"prompt": "p", "a": "none"}],
            {"patterns": {"a": "(#"}},
            r"data\.task\.patterns\.a='\(#': not a regular expression",
        ),
        ([{"q": None}], {"template": "{q}?"}, r"column 'q' is null \(data\.task\.template\)"),
        ([{"q": float("nan")}], {"template": "{q}?"}, r"column 'q' is NaN \(data\.task\.template\)"),
        ([{"prompt": "p"}], {"num_validation": -1}, r"data\.task\.num_validation=-1 must be at least 0"),
        ([{"q": "x"}], {"template": "{q} in \\boxed{}"}, r"double the braces that are meant literally"),
        ([{"q": "x"}], {"template": "{q"}, r"data\.task\.template='\{q'"),
        ([{"q": "x"}], {"template": "no column"}, r"put a column name in each pair of braces"),
        ([{"q": [1]}], {"template": "{q:d}"}, r"rows row 0: data\.task\.template does not fit the row"),
        ([{"q": "x"}], {"template": "{q.b}"}, r"rows row 0: data\.task\.template does not fit the row"),
        ([{"prompt": "p"}], {"system_prompt": "s", "conversational": False}, r"system_prompt has no effect"),
        ([{"prompt": "p"}], {"num_validation": 1}, r"num_validation=1 must be less than the 1 rows"),
        ([{"prompt": "p"}], {"num_validation": None}, r"num_validation=None must be less"),
        ([{"prompt": "p"}], {"validation_split": "test"}, r"validation_split=test: the source has no splits"),
        (["p"], {}, r"rows row 0: expected a row with columns, found str"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_row_or_the_key(
    source: list[Any], settings: dict[str, Any], message: str
) -> None:
    task = RowsTask(source, **{"num_validation": 0, **settings})
    with pytest.raises(UserError, match=message) as caught:
        task.train_row(0)
    assert "\n" not in str(caught.value)


def test_a_second_system_message_is_refused() -> None:
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match=r"the row has its own system message"):
        RowsTask([{"prompt": talk}], num_validation=0, system_prompt="c").train_row(0)


@pytest.mark.parametrize("settings", [{"config_name": "main"}, {"split": "test"}])
def test_settings_of_hub_datasets_are_refused_for_a_file(tmp_path: Path, settings: dict[str, str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n')
    (key,) = settings
    with pytest.raises(UserError, match=rf"data\.task\.{key}=\w+ has no effect on a file"):
        RowsTask(str(path), num_validation=0, **settings).train_row(0)


def test_a_misspelt_prompt_column_is_not_mistaken_for_duplicates() -> None:
    with pytest.raises(UserError, match=r"column 'promt' is missing"):
        RowsTask(_rows(10), num_validation=3, prompt_column="promt").train_row(0)


def _colour(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (4 * number, 0, 0))


class Opened:
    """Rows whose values are made when they are asked for, so that one may lie where the one before lay."""

    def __init__(self, make: Any, count: int = 60) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.make(index), "answer": str(index)}


def _palette(number: int) -> Image.Image:
    image = Image.new("P", (8, 8))
    image.putpalette([4 * number, 0, 0])
    return image


def _array(number: int) -> np.ndarray:
    """Differs where NumPy prints dots."""
    values = np.zeros((40, 40, 3), np.uint8)
    values[20, 20] = number
    return values


def _turned(number: int) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.getexif()[0x0112] = number % 8 + 1
    return image


@pytest.mark.parametrize("make", [_colour, _palette, _array, lambda i: [_colour(i)]])
def test_no_row_is_left_out_because_its_image_lies_where_another_one_lay(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = RowsTask(Opened(make), num_validation=10, template="What colour?", image_columns=["image"])
        assert task.num_train_rows == 50


@pytest.mark.parametrize("make", [_colour, _palette, _array])
def test_equal_images_and_arrays_are_equal_prompts(make: Any) -> None:
    rows = Opened(lambda i: make(i % 20))
    task = RowsTask(rows, num_validation=10, template="What colour?", image_columns=["image"])
    held_out = {int(row["answer"]) % 20 for row in task.validation_rows()}
    with pytest.warns(UserWarning, match="training rows of rows are left out"):
        assert task.num_train_rows == 60 - 3 * len(held_out)


def test_images_that_differ_in_the_rotation_a_camera_noted_are_other_prompts() -> None:
    task = RowsTask(Opened(_turned, 8), num_validation=3, template="What?", image_columns=["image"])
    assert task.num_train_rows == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            object(),
            "a value of type object cannot be compared with held-out prompts; give text, numbers, bytes, a path",
        ),
        ([io.BytesIO(b"a")], "a value of type BytesIO cannot be compared with held-out prompts; give text, numbers"),
        (Image.new("RGB", (0, 4)), "the image is 0 x 4 pixels; remove the row or fix the image"),
    ],
    ids=["object", "file", "empty"],
)
def test_what_has_nothing_to_be_compared_by_is_refused(value: Any, message: str) -> None:
    task = RowsTask(Opened(lambda i: value, 4), num_validation=1, template="What?", image_columns=["image"])
    with pytest.raises(UserError) as caught:
        task.train_row(0)
    assert str(caught.value).startswith(f"rows row {task._held_out[0]}, column 'image': {message}")


def test_no_image_is_decoded_to_be_compared_with_a_held_out_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image.Image, "tobytes", lambda *_: pytest.fail("decoded"))
    assert RowsTask(Opened(_colour, 4), num_validation=0, template="What?", image_columns=["image"]).num_train_rows == 4


def test_images_in_the_messages_of_a_dataset_stay_bytes_and_are_compared_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"prompt": datasets.List(message), "answer": datasets.Value("string")})
    rows = [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "image": _colour(number % 20)},
                        {"type": "text", "text": "What colour?", "image": None},
                    ],
                }
            ],
            "answer": str(number),
        }
        for number in range(30)
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    for source in (dataset, str(tmp_path / "rows.parquet")):
        task = RowsTask(source, num_validation=6)
        held_out = {int(row["answer"]) % 20 for row in task.validation_rows()}
        left = [n for n in range(30) if n % 20 not in held_out]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [int(task.train_row(i)["answer"]) for i in range(task.num_train_rows)] == left
        image = task.train_row(0)["prompt"][0]["content"][0]["image"]
        assert type(image["bytes"]) is bytes
        assert load_image(image, "row").getpixel((3, 3)) == (4 * (left[0] % 20), 0, 0)


@pytest.mark.parametrize(("value", "problem"), [(None, "null"), (" ", "blank"), (float("nan"), "NaN")])
@pytest.mark.parametrize("num_validation", [0, 1])
def test_an_image_that_is_missing_names_its_setting_and_an_empty_list_is_none(
    value: Any, problem: str, num_validation: int
) -> None:
    rows = [{"prompt": f"q{i}", "image": value} for i in range(2)]
    with pytest.raises(UserError) as caught:
        RowsTask(rows, num_validation=num_validation, image_columns=["image"]).train_row(0)
    assert re.sub("row [01]", "row N", str(caught.value)) == (
        f"rows row N: column 'image' is {problem} (data.task.image_columns); give an image, an empty list where the "
        "row has none, or leave the row out"
    )


def test_an_empty_list_is_no_image_and_a_column_that_is_missing_names_its_setting() -> None:
    task = RowsTask([{"prompt": "q", "image": []}], num_validation=0, image_columns=["image"])
    assert task.train_row(0)["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    for num_validation in (0, 1):
        task = RowsTask(_rows(2), num_validation=num_validation, image_columns=["image"])
        with pytest.raises(UserError, match=r"column 'image' is missing \(data\.task\.image_columns\); the row has"):
            task.train_row(0)


def _images(folder: Path) -> list[Path]:
    """Eight images, each in two files."""
    paths = []
    for kind in ("a", "b"):
        for number in range(8):
            paths.append(folder / kind / f"{number}{kind}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    "form",
    [
        str,
        lambda path: path,
        lambda path: path.as_uri(),
        lambda path: [str(path)],
        lambda path: path.read_bytes(),
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"bytes": path.read_bytes(), "path": path.name},
    ],
)
def test_a_held_out_image_is_left_out_under_any_name(form: Any, tmp_path: Path) -> None:
    rows = [{"image": form(path)} for path in _images(tmp_path)]
    task = RowsTask(rows, num_validation=4, template="What?", image_columns=["image"])
    with pytest.warns(UserWarning, match="4 training rows of rows are left out: their prompts are held out"):
        assert task.num_train_rows == 8


def test_a_held_out_image_is_left_out_where_its_column_has_another_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"columns": {"prompt": "question", "image": "picture"}, "image_columns": ["image"]}
    paths = [str(path) for path in _images(tmp_path)]
    rows: list[Any] = [{"question": "What?", "picture": path} for path in paths]
    task = RowsTask(rows, num_validation=4, **settings)
    with pytest.warns(UserWarning, match="4 training rows of rows are left out: their prompts are held out"):
        assert task.num_train_rows == 8
    image, text = task.train_row(0)["prompt"][0]["content"]
    assert (image, text) == (
        {"type": "image", "image": task.train_row(0)["picture"]},
        {"type": "text", "text": "What?"},
    )
    assert image["image"] in paths
    rows = [{"question": f"q{i}", "picture": None} for i in range(2)]
    with pytest.raises(UserError, match=r"^rows row [01]: column 'picture' is null \(data\.task\.image_columns\)"):
        RowsTask(rows, num_validation=1, **settings).train_row(0)


def test_a_held_out_image_of_a_message_or_a_folder_is_left_out_under_any_name(tmp_path: Path) -> None:
    paths = _images(tmp_path)
    talks = [[{"role": "user", "content": [{"type": "image", "image": str(path)}]}] for path in paths]
    folder = RowsTask(str(tmp_path), num_validation=4, template="What?", image_columns=["image"])
    for task in (RowsTask([{"prompt": talk} for talk in talks], num_validation=4), folder):
        with pytest.warns(UserWarning, match="4 training rows of .* are left out: their prompts are held out"):
            assert task.num_train_rows == 8


def test_only_files_of_the_size_of_a_held_out_one_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number)
    read: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    rows = [{"image": str(path), "prompt": f"{question}?"} for path in paths for question in range(5)]
    task = RowsTask(rows, num_validation=1, image_columns=["image"])
    assert task.num_train_rows == 44 and len(read) == 1
    (held_out,) = task.validation_rows()
    assert held_out["image"] == str(read[0])
