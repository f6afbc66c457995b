"""One dialogue in progress, as tokens: what the policy drew and what the environment put between its turns.

The same for every engine: those that draw a token at a time, and those that answer with a whole turn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from gspo_lightning.dialogue import Environments
from gspo_lightning.dialogue.environment import OpenDialogue
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Completion, Dialogue, FinishReason, Prompt


@dataclass
class Turns:
    """Tokens of one dialogue, in the order of the sequence that is trained on."""

    dialogue: OpenDialogue
    eos: tuple[int, ...]
    """End tokens of the policy, the usual one first."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the policy's tokens; 0 for the environment's."""
    trained: list[bool] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    """True at the first token of each of the policy's turns: with empty replies, nothing else separates two turns."""
    turn: list[int] = field(default_factory=list)
    """Tokens of the policy's current turn."""
    finish_reason: FinishReason = "length"

    def draw(self, token: int, logprob: float) -> None:
        """Appends a token of the policy."""
        self.begins.append(not self.turn)
        self.turn.append(token)
        self._append(token, logprob, trained=True)

    def hear(self, token: int) -> None:
        """Appends a token of the environment."""
        self.begins.append(False)
        self._append(token, 0.0, trained=False)

    def end_turn(self, budget: int) -> list[int] | None:
        """Shows the current turn to the environment.

        Args:
            budget: most tokens of the whole dialogue.

        Returns:
            The environment's tokens before the policy's next turn; None if the dialogue has ended, which it also has if
            there is no room for them and one token after them.
        """
        room = budget - len(self.tokens)
        text, has_end = self.dialogue.decode(self.turn), self.turn[-1] in self.eos
        between = self.dialogue.reply(text, has_end, self.eos, room)
        self.turn = []
        if between is None:
            self.finish_reason = "stop"
            return None
        return between if len(between) < room else None

    def completion(self) -> Completion:
        """The ended dialogue, with its rewards."""
        dialogue = self.dialogue
        if self.turn:  # cut by length
            dialogue.add(dialogue.decode(self.turn))
        while dialogue.messages[-1]["role"] != "assistant":  # no room was left for an answer to it
            dialogue.messages.pop()
        reward, turn_rewards = dialogue.result()
        return Completion(
            token_ids=torch.tensor(self.tokens),
            text="\n".join(map(_line, dialogue.messages)),
            sampler_logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            finish_reason=self.finish_reason,
            dialogue=Dialogue(
                torch.tensor(self.trained),
                dialogue.messages,
                reward,
                turn_rewards,
                begins=torch.tensor(self.begins),
                tool_counts=dialogue.tool_counts,
            ),
        )

    def _append(self, token: int, logprob: float, *, trained: bool) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.trained.append(trained)


def begin(policy: Policy, prompt: Prompt, generation: int, environments: Environments, seed: int) -> Turns:
    """Begins dialogue ``generation`` about a prompt, in the rollout with this seed."""
    own = _environment_seed(seed, prompt.uid, generation)
    return Turns(environments.begin(prompt, own, policy.tokenizer), tuple(policy.eos_token_ids))


def refuse_padded(policy: Policy) -> None:
    """Refuses a model whose rows are padded: nothing continues them where a turn ends."""
    if policy.is_padded:
        raise UserError(
            f"environment: {type(policy.base_model).__name__} runs padded and cannot continue where a turn ends; "
            "use a model that packs, or environment=none"
        )


def _line(message: dict[str, Any]) -> str:
    content = str(message["content"])
    return content if message["role"] == "assistant" else f"[{message['role']}] {content}"


def _environment_seed(seed: int, uid: str, generation: int) -> int:
    digest = hashlib.blake2b(f"environment|{seed}|{uid}|{generation}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
