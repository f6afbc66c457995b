"""The reward functions that come with the package, by hand, and on text meant to hurt them."""

from __future__ import annotations

import time

import pytest

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
    ],
)
def test_numeric_match(text, answer, right):
    assert numeric_match([text], [answer]) == [right]


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
