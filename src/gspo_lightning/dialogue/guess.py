"""A guessing game with feedback: an example of a dialogue whose turns have rewards."""

from __future__ import annotations

import re
from typing import Any

from gspo_lightning.dialogue.environment import Reply

_INTEGER = re.compile(r"\d+")


class GuessTheNumber:
    """The policy guesses the row's ``secret``; the answer is "higher" or "lower" until it is right.

    The whole dialogue is rewarded with 1 for the right number. With ``turn_rewards`` a turn also gets 0.2 if it is a
    guess that the feedback so far allows, else 0: a guess that is known to be wrong earns nothing.
    """

    def __init__(self, turn_rewards: bool = False) -> None:
        self.turn_rewards = turn_rewards

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """See `Environment.reset`."""
        self._secret, self._low, self._high = int(row["secret"]), int(row["low"]), int(row["high"])
        self._found = False

    def step(self, text: str) -> Reply:
        """See `Environment.step`."""
        numbers = _INTEGER.findall(text)
        guess = int(numbers[-1]) if numbers and len(numbers[-1]) < 9 else None
        reward = None
        if self.turn_rewards:
            reward = 0.2 if guess is not None and self._low <= guess <= self._high else 0.0
        if guess == self._secret:
            self._found = True
            return Reply(None, reward=reward)
        if guess is None:
            return Reply(f"Say a number from {self._low} to {self._high}.", reward=reward)
        higher = guess < self._secret
        if higher:
            self._low = max(self._low, guess + 1)
        else:
            self._high = min(self._high, guess - 1)
        return Reply("higher" if higher else "lower", reward=reward)

    def reward(self) -> float:
        """See `Environment.reward`."""
        return float(self._found)
