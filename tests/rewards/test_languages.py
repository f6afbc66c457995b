"""Answers in the words, digits and punctuation of other languages than English."""

from __future__ import annotations

import pytest

from gspo_lightning.rewards.mathematics import math_equal


@pytest.mark.parametrize(
    "answer",
    [
        "42元", "42 元", "42厘米", "42公里/小时", "42 см", "42 рублей", "42км/ч", "42 м", "42м²", "42 años", "42 élèves",
        "42 Äpfel", "42 ευρώ", "42 रुपये", "42개", "42 시간", "42 ชั่วโมง", "٤٢ يوما", "٤٢", "４２", "约42元", "第42题",
        "Ответ: 42.", "答案：42", "42（约）", "42 (约)", "￥42", "42 ₽", "42。", "42 %", "42％", "42 kΩ", "42 µm", "42\N{RIGHT-TO-LEFT MARK}",
    ],
)  # fmt: skip
def test_math_reads_a_number_with_a_unit_of_any_language(answer: str) -> None:
    for text in (r"\boxed{42}", "The answer is 42.", f"答案是{answer}"):
        assert math_equal(text, answer) is True, text
    assert math_equal(r"\boxed{43}", answer) is math_equal(r"\boxed{4}", answer) is False
    assert math_equal("42", answer, is_answer=True) is math_equal(answer, "42", is_answer=True) is True


@pytest.mark.parametrize(
    "answer",
    ["2х", "2 у", "2س", "2万", "2ⁿ", "2𝑥", "2ｘ", "2 πr", "2 ωt", "2或3", "2 или 3", "2元3角", "x2", "2 x"],
)
def test_a_letter_that_is_a_variable_or_a_numeral_is_no_unit(answer: str) -> None:
    assert math_equal(r"\boxed{2}", answer) is False
    assert math_equal("2", answer, is_answer=True) is False
    assert math_equal(rf"\boxed{{{answer}}}", answer) is True


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("答案是42。", "42", True),
        ("答案是-5。", "-5", True),
        ("答案是5。", "-5", False),
        ("答：共有12只，每只3元。", "3", True),
        (r"所以$x=3$。", "3", True),
        (r"\boxed{42元}", "42", True),
        (r"\boxed{42 км/ч}", "42", True),
        (r"\boxed{5或6}", "6", False),
        ("$5或6$", "6", False),
        (r"\boxed{٤٢}", "42", True),
        (r"\boxed{1\,234}", "1234", True),
        (r"\boxed{-5}", "－5度", True),
        (r"\boxed{1234}", "1,234元", True),
        (r"\boxed{3/4}", "3/4元", True),
        (r"\boxed{甲}", "甲", True),
        (r"\boxed{乙}", "甲", False),
    ],
)
def test_math_reads_completions_of_other_scripts(text: str, answer: str, right: bool) -> None:
    assert math_equal(text, answer) is right
