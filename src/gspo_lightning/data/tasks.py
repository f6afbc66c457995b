"""What a task is, and tasks that generate their rows: training rows by index, and a fixed held-out set."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from gspo_lightning.errors import UserError

Row = dict[str, Any]


class Task(Protocol):
    """Rows with at least ``prompt`` (a string or a list of messages); other columns go to rewards.

    A task with ``state_dict()`` and ``load_state_dict(state)`` may make its training rows of that state too.
    """

    @property
    def name(self) -> str:
        """Name of the task, part of every uid."""
        ...

    @property
    def num_train_rows(self) -> int | None:
        """Number of training rows; None for a task that never runs out."""
        ...

    def train_row(self, index: int) -> Row:
        """Training row ``index``: the same for the same index, always."""
        ...

    def validation_rows(self) -> list[Row]:
        """The held-out rows, which are never training rows."""
        ...


class Endless:
    """A task that never runs out."""

    @property
    def num_train_rows(self) -> None:
        """None: the task never runs out."""
        return None


@dataclass(frozen=True)
class LargestOfFour(Endless):
    """Questions for the largest of four distinct two-digit numbers.

    Row i is a function of (seed, i) alone. The held-out rows do not depend on ``seed``, so that runs with
    different seeds are measured on the same prompts; a training row with the numbers of a held-out one, in
    whatever order, is drawn again.
    """

    seed: int = 0
    num_validation: int = 256
    name: str = "largest_of_four"

    def train_row(self, index: int) -> Row:
        """Four numbers that are not those of any held-out row."""
        attempt = 0
        while True:
            numbers = _draw(f"train|{self.seed}|{index}|{attempt}")
            if frozenset(numbers) not in self._held_out_sets:
                return _row(numbers)
            attempt += 1

    def validation_rows(self) -> list[Row]:
        """``num_validation`` rows with different sets of numbers."""
        return [_row(numbers) for numbers in self._held_out]

    @cached_property
    def _held_out(self) -> list[list[int]]:
        if not 0 <= self.num_validation <= 100_000:
            raise UserError(f"data.task.num_validation={self.num_validation} must be between 0 and 100000")
        rows: dict[frozenset[int], list[int]] = {}
        draw = 0
        while len(rows) < self.num_validation:
            numbers = _draw(f"validation|{draw}")
            rows.setdefault(frozenset(numbers), numbers)
            draw += 1
        return list(rows.values())

    @cached_property
    def _held_out_sets(self) -> frozenset[frozenset[int]]:
        return frozenset(map(frozenset, self._held_out))


def _draw(key: str) -> list[int]:
    return random.Random(key).sample(range(10, 100), 4)


def _row(numbers: list[int]) -> Row:
    listed = ", ".join(map(str, numbers))
    question = f"Which is the largest of these numbers: {listed}? Answer with just the number."
    return {"prompt": [{"role": "user", "content": question}], "answer": str(max(numbers))}


@dataclass(frozen=True)
class Arithmetic(Endless):
    """Sum, difference or product of two whole numbers of ``digits`` digits.

    Like ``LargestOfFour`` an endless stream with a held-out set that no seed changes. If the order of the
    numbers does not change the answer, it makes no new problem: 3 + 4 is not trained on if 4 + 3 is held
    out.
    """

    op: Literal["+", "-", "*"] = "+"
    digits: int = 1
    seed: int = 0
    num_validation: int = 20
    instruction: str = "Answer with just the number."
    """Text after the question."""
    examples: tuple[dict[str, Any], ...] = ()
    """Messages before the question."""
    name: str = "arithmetic"

    def train_row(self, index: int) -> Row:
        """A problem that is not held out."""
        held_out, attempt = self._held_out, 0
        while True:
            pair = self._draw_pair(f"arithmetic|train|{self.seed}|{index}|{attempt}")
            if self._problem(pair) not in held_out:
                return self._row(pair)
            attempt += 1

    def validation_rows(self) -> list[Row]:
        """``num_validation`` different problems."""
        return [self._row(pair) for pair in self._held_out.values()]

    def _draw_pair(self, key: str) -> tuple[int, int]:
        generator = random.Random(key)
        numbers = range(0 if self.digits == 1 else 10 ** (self.digits - 1), 10**self.digits)
        return generator.choice(numbers), generator.choice(numbers)

    def _problem(self, pair: tuple[int, int]) -> tuple[int, int]:
        return pair if self.op == "-" else (min(pair), max(pair))

    def _row(self, pair: tuple[int, int]) -> Row:
        a, b = pair
        answer = {"+": a + b, "-": a - b, "*": a * b}[self.op]
        question = f"What is {a} {self.op} {b}? {self.instruction}"
        return {"prompt": [*self.examples, {"role": "user", "content": question.strip()}], "answer": str(answer)}

    @cached_property
    def _held_out(self) -> dict[tuple[int, int], tuple[int, int]]:
        if not 1 <= self.digits <= 9:
            raise UserError(f"data.task.digits={self.digits} must be between 1 and 9")
        count = 10 if self.digits == 1 else 9 * 10 ** (self.digits - 1)
        problems = count * count if self.op == "-" else count * (count + 1) // 2
        most = min(problems // 2, 100_000)
        if not 0 <= self.num_validation <= most:
            raise UserError(
                f"data.task.num_validation={self.num_validation} must be between 0 and {most}: there are "
                f"{problems} problems of {self.digits} digits, and half are kept for training"
            )
        held_out: dict[tuple[int, int], tuple[int, int]] = {}
        draw = 0
        while len(held_out) < self.num_validation:
            pair = self._draw_pair(f"arithmetic|validation|{draw}")
            held_out.setdefault(self._problem(pair), pair)
            draw += 1
        return held_out


@dataclass(frozen=True)
class SecretNumber(Endless):
    """A number between ``low`` and ``high`` to be guessed, for `gspo_lightning.dialogue.GuessTheNumber`."""

    low: int = 1
    high: int = 9
    seed: int = 0
    num_validation: int = 64
    examples: tuple[dict[str, Any], ...] = ()
    """Messages before the question."""
    name: str = "secret_number"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"data.task.low={self.low} must be at least 0 and below data.task.high={self.high}")

    def train_row(self, index: int) -> Row:
        """A secret that is a function of (seed, index)."""
        return self._row(random.Random(f"secret|train|{self.seed}|{index}").randint(self.low, self.high))

    def validation_rows(self) -> list[Row]:
        """Rows with every secret about equally often. The prompt is that of training: no secret is held out."""
        return [self._row(self.low + number % (self.high - self.low + 1)) for number in range(self.num_validation)]

    def _row(self, secret: int) -> Row:
        question = (
            f"I think of a number from {self.low} to {self.high}. Guess it. Answer with just the number. "
            "I will tell you whether my number is higher or lower."
        )
        return {
            "prompt": [*self.examples, {"role": "user", "content": question}],
            "secret": secret,
            "low": self.low,
            "high": self.high,
            "answer": str(secret),
        }


@dataclass(frozen=True)
class OnePrompt(Endless):
    """The same prompt in every row, for a reward without an upper end, such as the speed of code."""

    prompt: str
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns for the reward functions."""
    num_validation: int = 1
    name: str = "one_prompt"

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("data.task.prompt is empty")
        if self.num_validation < 1:
            raise UserError(f"data.task.num_validation={self.num_validation} must be at least 1")

    def train_row(self, index: int) -> Row:
        """The prompt; rows differ only in their sampling seed."""
        return {"prompt": [{"role": "user", "content": self.prompt}], **self.columns}

    def validation_rows(self) -> list[Row]:
        """The prompt again: there is no other."""
        return [self.train_row(0) for _ in range(self.num_validation)]
