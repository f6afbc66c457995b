"""Tasks that a random two-layer model with a vocabulary of characters learns in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_lightning.data.tasks import Endless, Row
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class MicroLetters(Endless):
    """Requests to repeat one letter. A randomly initialised character model learns it in seconds."""

    letters: str = "abcd"
    num_validation: int = 8
    name: str = "micro_letters"

    def __post_init__(self) -> None:
        if not self.letters:
            raise UserError("data.task.letters is empty; give at least one letter")

    def train_row(self, index: int) -> Row:
        """A row that asks for the letters in turn, with a counter that makes prompts differ in length."""
        letter = self.letters[index % len(self.letters)]
        return {"prompt": f"{index % 1000}{letter}:", "letter": letter}

    def validation_rows(self) -> list[Row]:
        """The same questions with a marker that no training row has."""
        letters = (self.letters[i % len(self.letters)] for i in range(self.num_validation))
        return [{"prompt": f"v{i}{letter}:", "letter": letter} for i, letter in enumerate(letters)]


@dataclass(frozen=True)
class MicroDigit(Endless):
    """Requests to copy the digit that ends the prompt, and nothing else: exact answers for the micro model.

    Training prompts begin with two small letters, held-out ones with two capitals; they repeat after 676 rounds of the
    digits.
    """

    digits: str = "0123"
    num_validation: int = 8
    name: str = "micro_digit"

    def __post_init__(self) -> None:
        if not self.digits:
            raise UserError("data.task.digits is empty; give at least one digit")

    def train_row(self, index: int) -> Row:
        """A row that asks for the digits in turn, after a counter in letters."""
        return self._row(index, ord("a"))

    def validation_rows(self) -> list[Row]:
        """The same questions after a counter in capitals."""
        return [self._row(index, ord("A")) for index in range(self.num_validation)]

    def _row(self, index: int, first_letter: int) -> Row:
        turn, place = divmod(index, len(self.digits))
        digit = self.digits[place]
        counter = chr(first_letter + turn // 26 % 26) + chr(first_letter + turn % 26)
        return {"prompt": f"{counter}{digit}=", "answer": digit}
