"""Decoding of dialogues: when a turn ends, the environment's tokens are fed to the same row, which then continues.

The row keeps its cache, so no token of a dialogue is forwarded twice.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
from torch import Tensor

from gspo_lightning.dialogue import Environments
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.decoder import Decoder, Row
from gspo_lightning.rollout.sampling import sample
from gspo_lightning.rollout.turns import begin, finish
from gspo_lightning.types import Completion, Prompt, SamplingParams


class DialogueDecoder(Decoder):
    """One batch of dialogues."""

    def __init__(
        self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int, environments: Environments
    ) -> None:
        super().__init__(policy, prompts, sampling, seed)
        self.environments = environments
        begun = begin(policy, [(prompts[row.prompt], row.generation) for row in self.rows], environments, seed)
        self.turns = {id(row): turns for row, turns in zip(self.rows, begun, strict=True)}
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
        ended = [self._add(*one) for one in zip(self.active, tokens, logprobs, strict=True)]
        over = self._end_turns([row for row, has_ended in zip(self.active, ended, strict=True) if has_ended])
        return torch.tensor(tokens, device=hidden.device), [id(row) not in over for row in self.active]

    def _add(self, row: Row, token: int, logprob: float | None) -> bool:
        """Appends a token, the environment's if it has no log-probability; returns whether it ends the row's turn."""
        own = self.turns[id(row)]
        if logprob is None:
            own.hear(token)
            return False
        own.draw(token, logprob)
        return token in self.eos or self._has_stop_string(own.turn)

    def _end_turns(self, rows: list[Row]) -> set[int]:
        """Shows the turns to the environments; returns the ids of the rows whose dialogue has ended."""
        turns = [self.turns[id(row)] for row in rows]
        texts = [own.said() for own in turns]
        questions = [partial(own.dialogue.step, text) for own, text in zip(turns, texts, strict=True)]
        answers = self.environments.threads.all(questions)
        over = set()
        for row, own, text, answer in zip(rows, turns, texts, answers, strict=True):
            between = own.end_turn(text, answer, self.sampling.max_completion_length)
            self.pending[id(row)].extend(between or ())
            if between is None:
                over.add(id(row))
        return over

    def _ended(self) -> list[Completion]:
        return finish([self.turns[id(row)] for row in self.rows], self.environments)
