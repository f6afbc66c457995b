"""The reward functions that come with the package, by hand, and on text meant to hurt them."""

from __future__ import annotations

import math
import time
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import TaggedNumber, exact_match, last_integer, letter_share, numeric_match
from gspo_lightning.rewards.functions import is_missing

NASTY = [
    "9**9**9**9",
    "(" * 10_000 + ")" * 10_000,
    "1," * 500_000,
    "9" * 1_000_000,
    "\x00\x00",
    "\ud800 5",
    "-" * 1_000_000,
    "11," * 300_000,
    "1{,}" * 300_000,
    "1\N{NO-BREAK SPACE}" * 500_000,
    "\N{EN DASH}" * 1_000_000,
    "",
]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The largest is 97.", "97", 1),
        ("97", "97", 1),
        ("97 is larger than 12", "97", 0),
        ("It is 1,234", "1234", 1),
        ("12, 45, 78, 33", "33", 1),
        ("temperature: -5", "-5", 1),
        ("197", "97", 0),
        ("no number", "97", 0),
        ("97", 97, 1),
        ("18", 18.0, 1),
        ("18", "18.0", 1),
        ("1000", 1e3, 1),
        ("25", "025", 1),
        ("025", "25", 1),
        ("000", "0", 1),
        ("-0", "0", 1),
        ("5", "+5", 1),
        ("1234", "1,234", 1),
        ("x = −5", "-5", 1),
        ("x = −5", "5", 0),
        ("-5", "−5", 1),
        ("5", "-5", 0),
    ],
)
def test_last_integer(text, answer, right):
    assert last_integer([text], [answer]) == [right]
    assert last_integer([[{"role": "assistant", "content": text}]], [answer]) == [right]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("is 5.0", "5", 1),
        ("0.333333", "0.333333333", 1),
        ("0.33", "0.3333", 0),
        ("1,234.5", 1234.5, 1),
        ("-.5", "-0.5", 1),
        ("none", "1", 0),
        ("it is −2.5", "-2.5", 1),
        ("-2.5", "−2.5", 1),
        ("1500", "1.5e3", 1),
        ("is 1.5e3.", "1500", 1),
        ("is 1.5e3.", "3", 0),
        ("2E-3 m", "0.002", 1),
        ("-.5e+1", "-5", 1),
        ("1e400", "400", 0),
        ("1e4000", "4000", 1),
        ("3ex", "3", 1),
        ("0x1e5f", "5", 1),
    ],
)
def test_numeric_match(text, answer, right):
    assert numeric_match([text], [answer]) == [right]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,23,456", 123456),
        ("-1,00,000", -100000),
        ("12,34,56,789", 123456789),
        ("1\N{NO-BREAK SPACE}234", 1234),
        ("1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567", 1234567),
        ("1\N{THIN SPACE}234", 1234),
        ("1'234", 1234),
        (r"1{,}234", 1234),
        (r"1\,234", 1234),
        (r"1,\!234,\!567", 1234567),
        (r"12{,}34{,}567", 1234567),
        ("－5", -5),
        ("–5", -5),
        ("‑5", -5),
        ("\N{HYPHEN}5", -5),
        ("＋5", 5),
        ("٤٢", 42),
        ("４２", 42),
        ("४२", 42),
        ("𝟒𝟐", 42),
        ("١٬٢٣٤", 1234),
        ("－１２", -12),
        ("42\N{RIGHT-TO-LEFT MARK}", 42),
        ("\N{LEFT-TO-RIGHT ISOLATE}42\N{POP DIRECTIONAL ISOLATE}", 42),
        ("\ufeff42", 42),
    ],
)
def test_all_rewards_of_numbers_read_grouping_and_digits_alike(text, value):
    """What is right is right as the completion and as the answer, and no part of it is taken for the whole."""
    others = [str(-value), str(abs(value))[-3:], str(abs(value))[1:] or "9"]
    for reward, frame in (
        (last_integer, "{}"),
        (numeric_match, "{}"),
        (TaggedNumber(right=1.0), "<SOLUTION>{}</SOLUTION>"),
    ):
        assert reward([frame.format(text)], answer=[str(value)]) == [1.0]
        assert reward([frame.format(value)], answer=[text]) == [1.0]
        for other in others:
            assert reward([frame.format(text)], answer=[other]) == [float(int(other) == value)]
    for reward in (last_integer, numeric_match):
        assert reward([f"答案：{text}。"], [str(value)]) == [1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3–5", 5),
        ("pages (3)–5", 5),
        ("between 2019‑2020", 2020),
        ("choice\N{HYPHEN}5", 5),
        ("GPT‑4", 4),
        ("(a)‑4", 4),
        ("2024\N{NO-BREAK SPACE}123", 123),
        ("1\N{NO-BREAK SPACE}2345", 2345),
        ("1 234", 234),
        ("1,23,45", 45),
        ("1,2345", 2345),
        ("11,22,33,44,55", 55),
    ],
)
def test_what_is_no_group_stays_apart(text, value):
    assert last_integer([text], [value]) == numeric_match([text], [value]) == [1.0]


def test_decimal_points_of_other_scripts():
    assert numeric_match(["٣٫٥", "３．５", "1,23,456.5"], ["3.5", "3.5", "123456.5"]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("answer", ["", "$18", "18.5", "2,3", "five", float("nan"), None, True])
def test_an_answer_that_no_integer_can_be_is_refused(answer):
    with pytest.raises(UserError, match=r"last_integer: the row's answer '.*' is not a whole number"):
        last_integer(["18"], [answer])


@pytest.mark.parametrize("answer", ["", "$18", "1.000,50", "five", "1e999", float("nan"), None])
def test_an_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(UserError, match=r"numeric_match: the row's answer '.*' is not a number"):
        numeric_match(["18"], [answer])


@pytest.mark.parametrize("answer", ["", " \n", float("nan"), None])
def test_saying_nothing_is_never_an_exact_match(answer):
    with pytest.raises(UserError, match="exact_match: the row's answer is blank, null or NaN"):
        exact_match([""], [answer])


def test_exact_match_ignores_white_space_at_the_ends_alone():
    assert exact_match([" yes \n", "ye s", "Yes"], ["yes"] * 3) == [1.0, 0.0, 0.0]


def test_letter_share():
    assert letter_share(["aab", "", "bbbb"], ["a", "a", "b"]) == [2 / 3, 0.0, 1.0]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_hostile_text_gets_a_reward_at_once(text):
    start = time.process_time()
    for function in (last_integer, numeric_match, exact_match):
        assert function([text], ["7"]) == [0.0]
    assert letter_share([text], ["a"]) == [0.0]
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "value", [None, "", " \n", math.nan, np.float32("nan"), np.float64("nan"), Decimal("nan"), pd.NA, pd.NaT], ids=repr
)
def test_an_empty_cell_of_any_table_is_missing(value):
    assert is_missing(value) is True


@pytest.mark.parametrize("value", [0, False, "0", np.float32(0), Decimal(0), 10**400, [], np.zeros(2), b""])
def test_what_is_there_is_not_missing(value):
    assert is_missing(value) is False
