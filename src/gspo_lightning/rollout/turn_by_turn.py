"""Dialogues for engines that answer a prompt with a whole turn, such as vLLM: one request per dialogue and turn.

A request holds all tokens of its dialogue so far, so a turn continues exactly the tokens that are trained on; the
engine's prefix cache keeps it from computing them again. No dialogue waits for another: each asks for its next turn as
soon as it has the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from gspo_lightning.dialogue import Environments
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.turns import Turns, begin, refuse_padded
from gspo_lightning.types import Completion, Prompt, SamplingParams

Request = tuple[Prompt, SamplingParams, int]
"""A prompt, how its completions are drawn, and a seed."""

NextOf = Callable[[int, list[Completion]], Request | None]
"""The request that follows the one of this number, given its completions; None if nothing follows."""


class Complete(Protocol):
    """Samples completions."""

    def __call__(self, requests: Sequence[Request], next_of: NextOf | None = None) -> list[list[Completion]]:
        """For each request its completions, in order.

        Args:
            requests: asked for together.
            next_of: called once a request is answered, while others are in progress; the request that it returns takes
                the number of the one before, and its completions replace those.
        """
        ...


@dataclass
class _Open:
    """A dialogue that waits for its next turn."""

    prompt: Prompt
    generation: int
    turns: Turns

    def request(self, sampling: SamplingParams, seed: int) -> Request:
        """The request for the next turn; its seed is one of this dialogue and this place in it."""
        said = self.turns.tokens
        left = sampling.max_completion_length - len(said)
        name = f"turn|{seed}|{self.generation}|{len(said)}"
        own = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        return _continued(self.prompt, said), replace(sampling, num_generations=1, max_completion_length=left), own

    def take(self, turn: Completion, budget: int) -> bool:
        """Appends the policy's turn and the environment's answer; returns whether the dialogue goes on."""
        for token, logprob in zip(turn.token_ids.tolist(), turn.sampler_logprobs.tolist(), strict=True):
            self.turns.draw(token, logprob)
        between = self.turns.end_turn(budget) if turn.finish_reason == "stop" else None
        for token in between or ():
            self.turns.hear(token)
        return between is not None


def sample_dialogues(
    complete: Complete,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    seed: int,
    environments: Environments,
) -> list[list[Completion]]:
    """``sampling.num_generations`` dialogues about each prompt.

    Args:
        complete: samples single turns.
        policy: its tokenizer and end tokens separate turns.
        prompts: the first message of each dialogue.
        sampling: of the dialogues; ``max_completion_length`` counts the environment's tokens too.
        seed: of the rollout; dialogue g of a prompt draws from ``(seed, prompt.uid, g)`` and its length so far alone.
        environments: answer the turns, one after another in this process.

    Raises:
        UserError: the model runs through the padded path, or an environment fails.
    """
    refuse_padded(policy)
    groups = [
        [_Open(prompt, g, begin(policy, prompt, g, environments, seed)) for g in range(sampling.num_generations)]
        for prompt in prompts
    ]
    dialogues = [dialogue for group in groups for dialogue in group]

    def next_of(number: int, answer: list[Completion]) -> Request | None:
        (turn,) = answer
        goes_on = dialogues[number].take(turn, sampling.max_completion_length)
        return dialogues[number].request(sampling, seed) if goes_on else None

    complete([dialogue.request(sampling, seed) for dialogue in dialogues], next_of)
    return [[dialogue.turns.completion() for dialogue in group] for group in groups]


def _continued(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt with the tokens after it, which are text."""
    if not tokens:
        return prompt
    more = torch.tensor(tokens)
    inputs = dict(prompt.mm_inputs)
    if inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(tokens))])
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, more]), mm_inputs=inputs)
