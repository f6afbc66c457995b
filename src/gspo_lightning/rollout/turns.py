"""One dialogue in progress, as tokens: what the policy drew and what the environment put between its turns.

The same for every engine: those that draw a token at a time, and those that answer with a whole turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gspo_lightning.dialogue import Environments, Reply
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

    def said(self) -> str:
        """Text of the current turn."""
        return self.dialogue.decode(self.turn)

    def end_turn(self, text: str, answer: Reply, budget: int) -> list[int] | None:
        """Ends the current turn.

        Args:
            text: of the turn.
            answer: what the environment said to it.
            budget: most tokens of the whole dialogue.

        Returns:
            The environment's tokens before the policy's next turn; None if the dialogue has ended, which it also has if
            there is no room for them and one token after them.
        """
        room = budget - len(self.tokens)
        between = self.dialogue.hear(text, answer, self.turn[-1] in self.eos, self.eos, room)
        self.turn = []
        if between is None:
            self.finish_reason = "stop"
            return None
        return between if len(between) < room else None

    def end(self) -> None:
        """Ends the dialogue, before it is rewarded."""
        dialogue = self.dialogue
        if self.turn:  # cut by length
            dialogue.add(self.said())
        while dialogue.messages[-1]["role"] != "assistant":  # no room was left for an answer to it
            dialogue.messages.pop()

    def completion(self, reward: float, turn_rewards: tuple[float, ...]) -> Completion:
        """The ended dialogue with its rewards, those of `OpenDialogue.result`."""
        dialogue = self.dialogue
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


def begin(policy: Policy, prompts: Sequence[tuple[Prompt, int]], environments: Environments, seed: int) -> list[Turns]:
    """Begins a dialogue for each prompt and number of a generation, in the rollout with this seed."""
    seeded = [(prompt, _environment_seed(seed, prompt.uid, generation)) for prompt, generation in prompts]
    dialogues = environments.begin_all(seeded, policy.tokenizer)
    return [Turns(dialogue, tuple(policy.eos_token_ids)) for dialogue in dialogues]


def finish(dialogues: Sequence[Turns], environments: Environments) -> list[Completion]:
    """Ends and rewards the dialogues."""
    for dialogue in dialogues:
        dialogue.end()
    results = environments.threads.all([dialogue.dialogue.result for dialogue in dialogues])
    return [dialogue.completion(*result) for dialogue, result in zip(dialogues, results, strict=True)]


def refuse_padded(policy: Policy) -> None:
    """Refuses a model whose rows are padded: nothing continues them where a turn ends."""
    if policy.samples_padded:
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
