"""A calculator that the policy may use: an example of a tool."""

from __future__ import annotations

import ast
import operator
from typing import Any

from gspo_lightning.dialogue.environment import Reply
from gspo_lightning.rewards.functions import last_integer

_OPERATIONS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_LONGEST = 40
"""Most characters of an expression."""


class Calculator:
    """``<calc>12*34</calc>`` in a turn is answered with the result; a turn without a call is the answer.

    The reward is 1 if the last integer of the last turn is the row's ``answer``, as `last_integer` reads it, else 0.
    """

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """See `Environment.reset`."""
        self._answer, self._last = row["answer"], ""
        last_integer([""], [self._answer])  # refuses an answer that is not a whole number

    def step(self, text: str) -> Reply:
        """See `Environment.step`."""
        self._last = text
        expression = call_of(text)
        return Reply(None) if expression is None else Reply(evaluate(expression), role="tool")

    def reward(self) -> float:
        """See `Environment.reward`."""
        return 0.0 if "<calc>" in self._last else last_integer([self._last], [self._answer])[0]


def call_of(text: str) -> str | None:
    """The text from the first ``<calc>`` to the next ``</calc>``, None if either is missing; in linear time."""
    expression, closed, _ = text.partition("<calc>")[2].partition("</calc>")
    return expression if closed else None


def evaluate(expression: str) -> str:
    """The value of sums, differences and products of whole numbers, or what is wrong with the expression.

    Args:
        expression: such as 12 * (3 + 4)
    """
    if len(expression) > _LONGEST:
        return "error: too long"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError):
        return "error: use whole numbers with + - *"


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return int(_OPERATIONS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError
