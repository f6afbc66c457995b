"""Tasks that write their own rows. A task owns its data: training rows by index, and a fixed held-out set."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

Row = dict[str, Any]


class Task(Protocol):
    """Rows with at least ``prompt`` (a string or a list of messages); other columns go to the reward functions."""

    name: str

    @property
    def num_train_rows(self) -> int | None:
        """How many training rows there are; None for a task that never runs out."""
        ...

    def train_row(self, index: int) -> Row:
        """Training row ``index``: the same for the same index, always."""
        ...

    def validation_rows(self) -> list[Row]:
        """The held-out rows, none of which is ever a training row."""
        ...


@dataclass(frozen=True)
class LargestOfFour:
    """Which of four distinct two-digit numbers is the largest?

    Row i is a function of (seed, i) alone. The held-out rows do not depend on ``seed``, so that runs with different
    seeds are measured on the same prompts; a training row with the numbers of a held-out one, in whatever order, is
    drawn again.
    """

    seed: int = 0
    num_validation: int = 256
    name: str = "largest_of_four"

    @property
    def num_train_rows(self) -> None:
        """Never runs out."""
        return None

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
class MicroLetters:
    """Write one letter again and again: learnable by a random character model in seconds, for tests and demos."""

    letters: str = "abcd"
    num_validation: int = 8
    name: str = "micro_letters"

    @property
    def num_train_rows(self) -> None:
        """Never runs out."""
        return None

    def train_row(self, index: int) -> Row:
        """Asks for the letters in turn, with a counter that makes the prompts differ in length and content."""
        letter = self.letters[index % len(self.letters)]
        return {"prompt": f"{index % 1000}{letter}:", "letter": letter}

    def validation_rows(self) -> list[Row]:
        """The same questions with a marker no training row has."""
        letters = (self.letters[i % len(self.letters)] for i in range(self.num_validation))
        return [{"prompt": f"v{i}{letter}:", "letter": letter} for i, letter in enumerate(letters)]
