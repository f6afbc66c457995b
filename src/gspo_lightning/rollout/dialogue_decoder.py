"""Decoding of dialogues: when a turn ends, the environment's tokens are fed to the same row, which then continues.

The row keeps its cache, so no token of a dialogue is forwarded twice.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.dialogue import Environments
from gspo_lightning.dialogue.environment import OpenDialogue
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.decoder import Decoder, Row
from gspo_lightning.rollout.sampling import sample
from gspo_lightning.types import Completion, Dialogue, Prompt, SamplingParams


@dataclass
class _Turns:
    """State of a decoder row besides its tokens."""

    dialogue: OpenDialogue
    pending: deque[int] = field(default_factory=deque)
    """Tokens of the environment that have not been fed yet."""
    trained: list[bool] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    """True at the first token of each of the policy's turns: with empty replies, nothing else separates two turns."""
    turn: list[int] = field(default_factory=list)
    """Tokens of the policy's current turn."""


class DialogueDecoder(Decoder):
    """One batch of dialogues."""

    def __init__(
        self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int, environments: Environments
    ) -> None:
        super().__init__(policy, prompts, sampling, seed)
        self.usual_eos = tuple(policy.eos_token_ids)
        self.turns = {
            id(row): _Turns(
                environments.begin(
                    prompts[row.prompt], _seed(seed, prompts[row.prompt].uid, row.generation), policy.tokenizer
                )
            )
            for row in self.rows
        }

    def _next(self, hidden: Tensor, step: int) -> tuple[Tensor, list[bool]]:
        turns = [self.turns[id(row)] for row in self.active]
        drawing = [number for number, own in enumerate(turns) if not own.pending]
        tokens = [own.pending.popleft() if own.pending else 0 for own in turns]
        logprobs = [0.0] * len(tokens)
        if drawing:
            index = torch.tensor(drawing)
            seen = self.seen[index.to(hidden.device)] if self.seen is not None else None
            uniforms = self.uniforms[index, step]
            drawn = sample(self.policy.logits(hidden[index.to(hidden.device)]), uniforms, self.sampling, seen)
            for number, token, logprob in zip(drawing, *(x.tolist() for x in drawn), strict=True):
                tokens[number], logprobs[number] = token, logprob
        sampled = set(drawing)
        alive = [
            self._add(row, own, tokens[number], logprobs[number], number in sampled)
            for number, (row, own) in enumerate(zip(self.active, turns, strict=True))
        ]
        return torch.tensor(tokens, device=hidden.device), alive

    def _add(self, row: Row, own: _Turns, token: int, logprob: float, sampled: bool) -> bool:
        """Appends a token; returns whether the row continues."""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        own.trained.append(sampled)
        own.begins.append(sampled and not own.turn)
        if not sampled:
            return True
        own.turn.append(token)
        if token not in self.eos and not self._has_stop_string(own.turn):
            return True
        room = self.sampling.max_completion_length - len(row.tokens)
        between = own.dialogue.reply(own.dialogue.decode(own.turn), token in self.eos, self.usual_eos, room)
        own.turn = []
        if between is None:
            row.finish_reason = "stop"
            return False
        # Without room for the environment's reply and one token after it the dialogue ends with this turn.
        if len(between) >= room:
            return False
        own.pending.extend(between)
        return True

    def _completion(self, row: Row) -> Completion:
        own = self.turns[id(row)]
        if own.turn:  # cut by length
            own.dialogue.add(own.dialogue.decode(own.turn))
        while own.dialogue.messages[-1]["role"] != "assistant":  # no room was left for an answer to it
            own.dialogue.messages.pop()
        reward, turn_rewards = own.dialogue.result()
        messages = own.dialogue.messages
        return Completion(
            token_ids=torch.tensor(row.tokens),
            text="\n".join(map(_line, messages)),
            sampler_logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            finish_reason=row.finish_reason,
            dialogue=Dialogue(
                torch.tensor(own.trained),
                messages,
                reward,
                turn_rewards,
                begins=torch.tensor(own.begins),
                tool_counts=own.dialogue.tool_counts,
            ),
        )


def _line(message: dict[str, Any]) -> str:
    content = str(message["content"])
    return content if message["role"] == "assistant" else f"[{message['role']}] {content}"


def _seed(seed: int, uid: str, generation: int) -> int:
    digest = hashlib.blake2b(f"environment|{seed}|{uid}|{generation}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
