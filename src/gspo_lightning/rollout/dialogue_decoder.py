"""Decoding of dialogues: when a turn ends, the environment's tokens are fed to the same row, which then continues.

The row keeps its cache, so no token of a dialogue is forwarded twice.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from gspo_lightning.dialogue import Environments
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.decoder import Decoder, Row
from gspo_lightning.rollout.sampling import sample
from gspo_lightning.rollout.turns import begin
from gspo_lightning.types import Completion, Prompt, SamplingParams


class DialogueDecoder(Decoder):
    """One batch of dialogues."""

    def __init__(
        self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int, environments: Environments
    ) -> None:
        super().__init__(policy, prompts, sampling, seed)
        self.turns = {
            id(row): begin(policy, prompts[row.prompt], row.generation, environments, seed) for row in self.rows
        }
        self.pending: dict[int, deque[int]] = {id(row): deque() for row in self.rows}
        """Tokens of the environment that have not been fed yet."""

    def _next(self, hidden: Tensor, step: int) -> tuple[Tensor, list[bool]]:
        pending = [self.pending[id(row)] for row in self.active]
        drawing = [number for number, waiting in enumerate(pending) if not waiting]
        tokens = [waiting.popleft() if waiting else 0 for waiting in pending]
        logprobs: list[float | None] = [None] * len(tokens)
        if drawing:
            index = torch.tensor(drawing)
            seen = self.seen[index.to(hidden.device)] if self.seen is not None else None
            uniforms = self.uniforms[index, step]
            drawn = sample(self.policy.logits(hidden[index.to(hidden.device)]), uniforms, self.sampling, seen)
            for number, token, logprob in zip(drawing, *(x.tolist() for x in drawn), strict=True):
                tokens[number], logprobs[number] = token, logprob
        alive = [self._add(*one) for one in zip(self.active, tokens, logprobs, strict=True)]
        return torch.tensor(tokens, device=hidden.device), alive

    def _add(self, row: Row, token: int, logprob: float | None) -> bool:
        """Appends a token, the environment's if it has no log-probability; returns whether the row continues."""
        own = self.turns[id(row)]
        if logprob is None:
            own.hear(token)
            return True
        own.draw(token, logprob)
        if token not in self.eos and not self._has_stop_string(own.turn):
            return True
        between = own.end_turn(self.sampling.max_completion_length)
        self.pending[id(row)].extend(between or ())
        return between is not None

    def _completion(self, row: Row) -> Completion:
        return self.turns[id(row)].completion()
