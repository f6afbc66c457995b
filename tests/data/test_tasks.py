"""Tasks that write their own rows: right answers, rows fixed by their index, held-out rows kept apart."""

from __future__ import annotations

import re

import pytest

from gspo_lightning.data import Arithmetic, LargestOfFour, MicroDigit, MicroLetters
from gspo_lightning.errors import UserError


def _text(row: dict) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def _numbers(row: dict) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", _text(row))]


def test_largest_of_four_asks_for_four_distinct_two_digit_numbers_and_knows_the_largest() -> None:
    for index in range(300):
        row = LargestOfFour().train_row(index)
        numbers = _numbers(row)
        assert len(set(numbers)) == 4 and all(10 <= n <= 99 for n in numbers)
        assert row["answer"] == str(sorted(numbers)[-1])


def test_largest_of_four_row_depends_on_seed_and_index_alone() -> None:
    first, second = LargestOfFour(seed=5), LargestOfFour(seed=5)
    backwards = [second.train_row(i) for i in reversed(range(50))][::-1]
    assert [first.train_row(i) for i in range(50)] == backwards
    assert len({_text(first.train_row(i)) for i in range(50)}) == 50
    assert [LargestOfFour(seed=6).train_row(i) for i in range(50)] != backwards


def test_largest_of_four_keeps_its_stream_over_releases() -> None:
    # A checkpoint of an older release continues on the same prompts, and published numbers keep their
    # held-out set.
    assert _numbers(LargestOfFour(seed=0).train_row(0)) == [53, 86, 25, 80]
    assert _numbers(LargestOfFour(seed=0).train_row(1)) == [42, 24, 55, 62]


def test_largest_of_four_measures_every_seed_on_the_same_256_different_held_out_rows() -> None:
    rows = LargestOfFour(seed=1).validation_rows()
    assert rows == LargestOfFour(seed=2).validation_rows()
    assert len({frozenset(_numbers(row)) for row in rows}) == len(rows) == 256


def test_largest_of_four_never_trains_on_the_numbers_of_a_held_out_row_in_any_order() -> None:
    # 60,000 held-out sets of the 2,555,190 there are: about 23 of 1,000 draws would hit one.
    task = LargestOfFour(num_validation=60_000)
    held_out = {frozenset(_numbers(row)) for row in task.validation_rows()}
    small = LargestOfFour(num_validation=0)
    hits = [i for i in range(1000) if frozenset(_numbers(small.train_row(i))) in held_out]
    assert 5 <= len(hits) <= 60
    assert not any(frozenset(_numbers(task.train_row(i))) in held_out for i in range(1000))
    others = [i for i in range(1000) if i not in hits]
    assert all(task.train_row(i) == small.train_row(i) for i in others)


@pytest.mark.parametrize("op", ["+", "-", "*"])
def test_arithmetic_answers_are_right_and_operands_have_their_digits(op: str) -> None:
    task = Arithmetic(op=op, digits=2, num_validation=50)
    for row in [*task.validation_rows(), *(task.train_row(i) for i in range(100))]:
        a, b = map(int, re.search(r"(\d+) \S (\d+)", _text(row)).groups())
        assert 10 <= a <= 99 and 10 <= b <= 99
        assert int(row["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[op]
        assert f"{a} {op} {b}" in _text(row)


def test_arithmetic_does_not_train_on_a_held_out_sum_with_its_numbers_swapped() -> None:
    task = Arithmetic(op="+", digits=1, num_validation=27)
    held_out = {frozenset(_numbers(row)) for row in task.validation_rows()}
    assert len(held_out) == 27
    trained = {frozenset(_numbers(task.train_row(i))) for i in range(2000)}
    assert trained.isdisjoint(held_out)
    assert len(trained) == 55 - 27  # every other sum of 0..9 comes up


def test_arithmetic_differences_are_different_problems_when_swapped() -> None:
    task = Arithmetic(op="-", digits=1, num_validation=50)
    held_out = {tuple(_numbers(row)) for row in task.validation_rows()}
    trained = {tuple(_numbers(task.train_row(i))) for i in range(3000)}
    assert len(held_out) == 50 and len(trained) == 50 and trained.isdisjoint(held_out)


def test_arithmetic_refuses_to_hold_out_more_than_half_of_all_problems() -> None:
    with pytest.raises(UserError, match=r"num_validation=28 must be between 0 and 27: there are 55 problems"):
        Arithmetic(op="*", digits=1, num_validation=28).validation_rows()
    with pytest.raises(UserError, match=r"data.task.digits=0"):
        Arithmetic(digits=0).train_row(0)


def test_micro_letters_prompt_names_the_letter_and_held_out_prompts_are_new() -> None:
    task = MicroLetters(letters="xyz", num_validation=6)
    rows = [task.train_row(i) for i in range(1200)]
    assert [row["letter"] for row in rows[:4]] == ["x", "y", "z", "x"]
    assert all(row["prompt"].endswith(row["letter"] + ":") for row in rows)
    assert {row["prompt"] for row in rows}.isdisjoint(row["prompt"] for row in task.validation_rows())


def test_micro_digit_answer_is_the_digit_in_the_prompt_and_held_out_prompts_are_new() -> None:
    task = MicroDigit(digits="37", num_validation=4)
    assert task.train_row(0) == {"prompt": "aa3=", "answer": "3"}
    assert task.train_row(3) == {"prompt": "ab7=", "answer": "7"}
    assert task.train_row(2 * 26) == {"prompt": "ba3=", "answer": "3"}
    assert [row["prompt"] for row in task.validation_rows()] == ["AA3=", "AA7=", "AB3=", "AB7="]
