"""The protocol of an environment, and what drives one dialogue with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from gspo_lightning.dialogue.template import continuation
from gspo_lightning.errors import UserError
from gspo_lightning.types import Messages, Prompt


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn of the policy."""

    text: str | None
    """None ends the dialogue."""
    role: str = "user"
    """Of the message in the chat template, such as ``tool``."""
    reward: float | None = None
    """Of the policy's turn; None in all turns if the dialogue is rewarded as a whole. A final `Reply(None, ...)` has
    the one of the last turn."""


class Environment(Protocol):
    """One dialogue about one dataset row. Everything random in it must derive from the row and ``seed``."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """Begins the dialogue. The prompt of the row is its first message."""
        ...

    def step(self, text: str) -> Reply:
        """Answers a finished turn of the policy, decoded without special tokens."""
        ...

    def reward(self) -> float:
        """Of the whole dialogue, when it has ended: by a `Reply` without text, by the number of turns, or by length."""
        ...


@dataclass(frozen=True)
class Environments:
    """Makes an environment for every dialogue.

    Args:
        make: returns a fresh `Environment`.
        max_turns: turns of the policy after which a dialogue ends.
        chat_template_kwargs: for the chat template, as for the prompts.
    """

    make: Callable[[], Environment]
    max_turns: int = 4
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise UserError(f"environment.max_turns={self.max_turns} must be at least 1")

    def begin(self, prompt: Prompt, seed: int, tokenizer: PreTrainedTokenizerBase) -> OpenDialogue:
        """A dialogue about the row of ``prompt``."""
        environment = self.make()
        dialogue = OpenDialogue(environment, prompt, self, tokenizer)
        dialogue.ask("reset", dict(prompt.sample), seed)
        return dialogue


class OpenDialogue:
    """A dialogue under way. Errors of the environment become one line that names the row."""

    def __init__(
        self, environment: Environment, prompt: Prompt, settings: Environments, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.environment, self.prompt, self.settings, self.tokenizer = environment, prompt, settings, tokenizer
        self.messages: Messages = []
        self.turn_rewards: list[float | None] = []

    def reply(self, text: str, has_end: bool, eos: tuple[int, ...]) -> list[int] | None:
        """Tokens of what comes between a turn of the policy and its next one; None ends the dialogue.

        Args:
            text: the turn, decoded.
            has_end: whether its last token is an end-of-sequence token (and not the end of a stop string).
            eos: end-of-sequence tokens of the policy, the usual one first.
        """
        answer = self.ask("step", text)
        if not isinstance(answer, Reply):
            raise UserError(f"{self._name}.step must return a Reply, not {type(answer).__name__} ({self._where})")
        self.add(text)
        self.turn_rewards.append(answer.reward)
        if answer.text is None or len(self.turn_rewards) >= self.settings.max_turns:
            return None
        message = {"role": answer.role, "content": answer.text}
        self.messages.append(message)
        plain = isinstance(self.prompt.prompt, str)
        return continuation(self.tokenizer, message, self.settings.chat_template_kwargs, has_end, eos, plain)

    def add(self, text: str) -> None:
        """Notes a turn of the policy."""
        self.messages.append({"role": "assistant", "content": text})

    def result(self) -> tuple[float, tuple[float, ...]]:
        """The reward of the whole, and those of the turns if there are any.

        Raises:
            UserError: a reward is no finite number, or some turns have one and others none.
        """
        whole = self.ask("reward")
        given = [reward for reward in self.turn_rewards if reward is not None]
        for value in (whole, *given):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{self._name}: a reward must be a finite number, not {value!r} ({self._where})")
        if given and len(given) < len(self.turn_rewards):
            raise UserError(f"{self._name}: some turns have a reward and others none ({self._where})")
        # A turn that was cut by length has not been shown to the environment: it earns nothing of its own.
        turns = sum(message["role"] == "assistant" for message in self.messages)
        return float(whole), tuple(float(x) for x in given) + (0.0,) * (turns - len(given) if given else 0)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls the environment."""
        try:
            return getattr(self.environment, method)(*arguments)
        except UserError as error:
            raise UserError(f"{self._name}.{method}: {error} ({self._where})") from error
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{self._name}.{method} raised {what} ({self._where})") from error

    @property
    def _name(self) -> str:
        return f"environment {type(self.environment).__name__}"

    @property
    def _where(self) -> str:
        return f"row {self.prompt.uid}"
