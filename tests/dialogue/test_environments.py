"""The environments that come with the package."""

from __future__ import annotations

import random
import re

import pytest

from gspo_lightning.data import SecretNumber
from gspo_lightning.dialogue import Calculator, GuessTheNumber
from gspo_lightning.dialogue.calculator import call_of, evaluate
from gspo_lightning.errors import UserError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        (" 2 + 3 * 4 ", "14"),
        ("-(7 - 9)", "2"),
        ("2 ** 99", "error: use whole numbers with + - *"),
        ("1.5 + 1", "error: use whole numbers with + - *"),
        ("__import__('os')", "error: use whole numbers with + - *"),
        ("9" * 41, "error: too long"),
        ("1 +", "error: use whole numbers with + - *"),
        ("True + 1", "error: use whole numbers with + - *"),
        ("007", "error: use whole numbers with + - *"),
    ],
)
def test_the_calculator_knows_whole_numbers_and_nothing_else(expression, value):
    assert evaluate(expression) == value


def test_the_calculator_is_asked_and_the_last_turn_counts():
    calculator = Calculator()
    calculator.reset({"answer": "408"}, 0)
    reply = calculator.step("<calc>12*34</calc>")
    assert (reply.text, reply.role, calculator.reward()) == ("408", "tool", 0.0)
    assert calculator.step("It is 408.").text is None and calculator.reward() == 1.0
    calculator.reset({"answer": "408"}, 0)
    assert calculator.step("It is 407.").text is None and calculator.reward() == 0.0


@pytest.mark.parametrize("turn", ["9,801", "It is **9,801**.", "9801", r"\(9{,}801\)"])
def test_the_calculator_reads_numbers_as_the_reward_functions_do(turn):
    calculator = Calculator()
    for answer, reward in (("9801", 1.0), ("9,801", 1.0), ("801", 0.0)):
        calculator.reset({"answer": answer}, 0)
        assert calculator.step(turn).text is None and calculator.reward() == reward
    with pytest.raises(UserError, match="the row's answer '9.5' is not a whole number"):
        calculator.reset({"answer": "9.5"}, 0)


def test_a_call_stands_between_the_first_opening_and_the_next_closing():
    assert call_of("<calc>1<calc>2</calc>3</calc>") == "1<calc>2"
    assert call_of("</calc><calc>1\n+ 1</calc>") == "1\n+ 1" and call_of("<calc></calc>") == ""
    assert call_of("no") is call_of("<calc>1") is call_of("1</calc>") is call_of("</calc><calc>") is None
    draw, pattern = random.Random(0), re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
    found = 0
    for _ in range(2_000):
        text = "".join(draw.choices(["<calc>", "</calc>", "1", "\n", "<", "calc>", "/"], k=draw.randrange(9)))
        call = pattern.search(text)
        assert call_of(text) == (None if call is None else call[1])
        found += call is not None
    assert 200 < found < 1_800


def test_a_million_openings_without_a_closing_take_no_time():
    """A search from each of them to the end would take hours."""
    calculator = Calculator()
    calculator.reset({"answer": "1"}, 0)
    assert calculator.step("<calc>" * 1_000_000).text is None and calculator.reward() == 0.0


def test_a_number_that_python_refuses_to_read_is_a_wrong_answer():
    calculator = Calculator()
    calculator.reset({"answer": "408"}, 0)
    calculator.step("9" * 5_000)
    assert calculator.reward() == 0.0
    calculator.step("9" * 5_000 + " and 408")
    assert calculator.reward() == 1.0


def test_the_game_narrows_the_range_and_rewards_guesses_that_can_be_right():
    game = GuessTheNumber(turn_rewards=True)
    game.reset({"secret": 6, "low": 1, "high": 9}, 0)
    replies = [game.step(text) for text in ("5", "4", "what?", "8", "7?", "6")]
    assert [r.text for r in replies] == ["higher", "higher", "Say a number from 6 to 9.", "lower", "lower", None]
    assert [r.reward for r in replies] == [0.2, 0.0, 0.0, 0.2, 0.2, 0.2]
    assert game.reward() == 1.0
    plain = GuessTheNumber()
    plain.reset({"secret": 6, "low": 1, "high": 9}, 0)
    assert plain.step("5").reward is None and plain.reward() == 0.0


def test_secrets_are_a_function_of_seed_and_index_and_held_out_ones_cover_the_range():
    task = SecretNumber(low=1, high=9, seed=4, num_validation=18)
    assert sorted(row["secret"] for row in task.validation_rows()) == sorted(2 * list(range(1, 10)))
    drawn = [task.train_row(i)["secret"] for i in range(300)]
    assert drawn == [SecretNumber(seed=4).train_row(i)["secret"] for i in range(300)] and set(drawn) == set(
        range(1, 10)
    )
    with pytest.raises(UserError, match=r"data.task.low=9 must be .* below data.task.high=9"):
        SecretNumber(low=9, high=9)
