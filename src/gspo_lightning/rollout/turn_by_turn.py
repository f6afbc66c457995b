"""Dialogues for engines that answer a prompt with a whole turn, such as vLLM: one request per dialogue and turn.

A request holds all tokens of its dialogue so far, so a turn continues exactly the tokens that are trained on; the
engine's prefix cache keeps it from computing them again. No dialogue waits for another: each asks for its next turn as
soon as it has the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from gspo_lightning.dialogue import Environments, Reply
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.turns import Turns, begin, finish, refuse_padded
from gspo_lightning.types import Completion, Prompt, SamplingParams

Request = tuple[Prompt, SamplingParams, int]
"""A prompt, how its completions are drawn, and a seed."""

Following = Future[Callable[[], Request | None]]
"""Once it has ended, its result is called in the caller's thread and makes the next request, or None."""

NextOf = Callable[[int, list[Completion]], Following | None]
"""Asks what follows the request of this number, given its completions; None if nothing follows."""


class Complete(Protocol):
    """Samples completions."""

    def __call__(self, requests: Sequence[Request], next_of: NextOf | None = None) -> list[list[Completion]]:
        """For each request its completions, in order.

        Args:
            requests: asked for together.
            next_of: called once a request is answered, while others are in progress; the request that follows takes the
                number of the one before, and its completions replace those.
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

    def take(self, turn: Completion) -> None:
        """Appends the policy's turn."""
        for token, logprob in zip(turn.token_ids.tolist(), turn.sampler_logprobs.tolist(), strict=True):
            self.turns.draw(token, logprob)

    def hear(self, text: str, answer: Reply, budget: int) -> bool:
        """Appends what the environment said to the turn with this text; returns whether the dialogue continues."""
        between = self.turns.end_turn(text, answer, budget)
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
        environments: answer the turns, ``workers`` at a time, while others are sampled.

    Raises:
        UserError: the model runs through the padded path, or an environment fails.
    """
    refuse_padded(policy)
    count, budget = sampling.num_generations, sampling.max_completion_length
    everyone = [(prompt, generation) for prompt in prompts for generation in range(count)]
    begun = begin(policy, everyone, environments, seed)
    dialogues = [_Open(*one, turns) for one, turns in zip(everyone, begun, strict=True)]

    def next_of(number: int, answer: list[Completion]) -> Following | None:
        dialogue, (turn,) = dialogues[number], answer
        dialogue.take(turn)
        if turn.finish_reason != "stop":
            return None
        text = dialogue.turns.said()

        def ask() -> Callable[[], Request | None]:
            said = dialogue.turns.dialogue.step(text)
            return lambda: dialogue.request(sampling, seed) if dialogue.hear(text, said, budget) else None

        return environments.threads.submit(ask)

    complete([dialogue.request(sampling, seed) for dialogue in dialogues], next_of)
    done = finish(begun, environments)
    return [done[start : start + count] for start in range(0, len(done), count)]


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
