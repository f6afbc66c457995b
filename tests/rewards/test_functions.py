"""The reward functions that come with the package, by hand, and on text meant to hurt them."""

from __future__ import annotations

import time

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import exact_match, last_integer, letter_share, numeric_match

NASTY = [
    "9**9**9**9",
    "(" * 10_000 + ")" * 10_000,
    "1," * 500_000,
    "9" * 1_000_000,
    "\x00\x00",
    "\ud800 5",
    "-" * 1_000_000,
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
    ],
)
def test_numeric_match(text, answer, right):
    assert numeric_match([text], [answer]) == [right]


@pytest.mark.parametrize("answer", ["", "$18", "18.5", "2,3", "five", float("nan"), None, True])
def test_an_answer_that_no_integer_can_be_is_refused(answer):
    with pytest.raises(UserError, match=r"last_integer: the row's answer '.*' is no whole number"):
        last_integer(["18"], [answer])


@pytest.mark.parametrize("answer", ["", "$18", "1.000,50", "five", "1e999", float("nan"), None])
def test_an_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(UserError, match=r"numeric_match: the row's answer '.*' is no number"):
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
