"""Random prompts, completions, rewards and sampler's log-probabilities for a case."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from gspo_lightning.types import Completion, Dialogue, Prompt
from tests.whole_update.case import Case
from tests.whole_update.models import seen_prompt
from tests.whole_update.reference_model import Network

VOCABULARY = range(3, 90)

SPACED = (0.1, 0.2, 0.3, 0.2)
"""Rewards of which one is the mean but for rounding, whose advantage must be 0: (0.1 + 0.2 + 0.3) / 3 is not 0.2."""


def scripted_stream(case: Case, network: Network) -> list[Prompt]:
    """The prompts of a run in their order, with completions and rewards in the row: enough for any that are redrawn."""
    random, more = Random(f"rollouts {case.seed}"), Random(f"redrawn {case.seed}")
    count = case.prompts * case.rollouts
    prompts = [_prompt(case, random, network, number) for number in range(count)]
    return prompts + [_prompt(case, more, network, number) for number in range(count, count * (1 + case.max_draws))]


def _prompt(case: Case, random: Random, network: Network, number: int) -> Prompt:
    uid, tokens = f"scripted:{number}", torch.tensor(_draw(random, random.choice([1, 1, 3, 7, 12])))
    prompt = seen_prompt(case, uid, number) if network.sees else Prompt(uid, "", tokens, {})
    if not prompt.mm_inputs:
        system = torch.tensor(_draw(Random(f"system {case.seed}"), case.system), dtype=torch.long)
        prompt = replace(prompt, input_ids=torch.cat([system, prompt.input_ids]))
    lengths = [random.choice([1, 1, 2, 5, 8, case.max_length]) for _ in range(case.generations)]
    alike = _draw(random, case.max_length)  # completions that begin alike have ties of entropies
    completions = [_completion(case, random, network, prompt, n, alike) for n in lengths]
    rewards = [_rewards(case, random) for _ in completions]
    if case.rewards == "random" and random.random() < 0.4:
        rewards = [[spaced, *own[1:]] for spaced, own in zip(SPACED, rewards, strict=False)]
    if case.rewards == "silent" or random.random() < 0.3:
        rewards = [rewards[0]] * len(rewards)
    if case.turns == "rewarded" and random.random() < 0.4:
        completions = [_cancelling(c) for c in completions]
        rewards = [[-0.3, *rewards[0][1:]]] * len(rewards)
    return replace(prompt, sample={"completions": completions, "rewards": rewards})


def _draw(random: Random, count: int) -> list[int]:
    return [random.choice(VOCABULARY) for _ in range(count)]


def _completion(
    case: Case, random: Random, network: Network, prompt: Prompt, length: int, alike: list[int]
) -> Completion:
    """Unlikely tokens, shared ones, or the likeliest, whose ratios stay within the clip for longer."""
    kind = random.choice(["drawn", "drawn", "alike", "likeliest"])
    tokens = torch.tensor(alike[:length] if kind == "alike" else _draw(random, length))
    if kind == "likeliest":
        for t in range(length):
            every = _log_distributions(case, network, prompt, tokens)[t]
            # A placeholder that is sampled is an ordinary token, but not to the model's own forward.
            tokens[t] = int(every.index_fill(0, torch.tensor(network.placeholders, dtype=torch.long), -1e9).argmax())
    exact = _log_distributions(case, network, prompt, tokens).gather(1, tokens[:, None])[:, 0]
    noise = random.choice([0.0, 0.05, 0.3])  # a sampler that is not the trainer
    reported = (exact + torch.tensor([random.gauss(0, noise) for _ in range(length)]).double()).float()
    dialogue = _dialogue(case, random, length)
    if dialogue is not None:
        reported = reported * dialogue.trained
    return Completion(tokens, "", reported, random.choice(["stop", "stop", "length"]), dialogue)


@torch.no_grad()
def _log_distributions(case: Case, network: Network, prompt: Prompt, tokens: Tensor) -> Tensor:
    return network.log_distributions(network.start, prompt, tokens, case.temperature, case.padded)


def _dialogue(case: Case, random: Random, length: int) -> Dialogue | None:
    """Tokens of the environment anywhere but at the ends; sometimes turns that follow each other without one."""
    if case.turns is None or (case.turns == "dialogue" and random.random() < 0.2):
        return None
    trained = [True, *(random.random() < 0.6 for _ in range(length - 2)), True][:length]
    begins = [on and (t == 0 or not trained[t - 1]) for t, on in enumerate(trained)]
    marked = random.random() < 0.3
    if marked:
        begins = [b or (on and random.random() < 0.3) for b, on in zip(begins, trained, strict=True)]
    choices = [0.0, 0.5, 0.1, 0.2, 0.3, random.random()]
    rewards = tuple(random.choice(choices) for b in begins if b) if case.turns == "rewarded" else ()
    return Dialogue(torch.tensor(trained), [], 0.0, rewards, torch.tensor(begins) if marked else None)


def _cancelling(completion: Completion) -> Completion:
    """Rewards of turns whose sum is 0.3 but for rounding, so that a whole of -0.3 leaves nothing."""
    assert completion.dialogue is not None
    turns = len(completion.dialogue.turn_rewards)
    return replace(completion, dialogue=replace(completion.dialogue, turn_rewards=(0.3 / turns,) * turns))


def _rewards(case: Case, random: Random) -> list[float]:
    """Of one completion by every function; the second one does not apply everywhere."""
    first = {
        "random": random.choice([0.1, 0.2, 0.3, random.random()]),
        "binary": float(random.random() < 0.5),
        "silent": 0.1,
        "large": random.choice([0.0, 1e6]) * random.random(),
        "small": 1e-6 * random.random(),
        "offset": 1e3 + random.random(),
    }[case.rewards]
    others = [float(random.choice([0, 1, math.nan])) for _ in case.reward_weights[1:]]
    return [first, *others]
