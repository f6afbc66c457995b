"""Advantages per turn: what came after a turn, compared with the same turn of the other dialogues of the group."""

from __future__ import annotations

import torch

from gspo_lightning.advantages import AdvantageEstimator, silent_groups
from gspo_lightning.types import Completion


def turn_advantages(
    completions: list[list[Completion]], rewards: torch.Tensor, estimator: AdvantageEstimator
) -> list[list[tuple[float, ...]]] | None:
    """Advantages of every turn of every dialogue, or None where no environment rewards turns.

    The return of turn t is the sum of the turn rewards from t on, and the reward of the whole (``rewards``, as the
    reward functions made it). It is compared among the dialogues of the group that have a turn t; a turn that no
    other dialogue reached has the advantage of its dialogue's first turn.

    Args:
        completions: B lists of G.
        rewards: ``(B, G)`` float64.
        estimator: compares within a group.
    """
    if not any(c.dialogue is not None and c.dialogue.turn_rewards for group in completions for c in group):
        return None
    return [_of_group(group, rewards[number], estimator) for number, group in enumerate(completions)]


def silent_rollout(completions: list[list[Completion]], rewards: torch.Tensor) -> torch.Tensor:
    """Groups without signal, ``(B,)`` bool: all rewards are equal, and so are all returns of every turn.

    Args:
        completions: B lists of G.
        rewards: ``(B, G)``.
    """
    silent = silent_groups(rewards)
    for number in silent.nonzero().flatten().tolist():
        group = completions[number]
        if any(c.dialogue is not None and c.dialogue.turn_rewards for c in group):
            returns = [_returns(c, whole) for c, whole in zip(group, rewards[number].tolist(), strict=True)]
            silent[number] = not any(len(set(of_turn)) > 1 for of_turn in _by_turn(returns))
    return silent


def _by_turn(returns: list[list[float]]) -> list[list[float]]:
    """Returns of the dialogues that have a turn, turn by turn."""
    return [[own[turn] for own in returns if len(own) > turn] for turn in range(max(map(len, returns)))]


def _of_group(group: list[Completion], rewards: torch.Tensor, estimator: AdvantageEstimator) -> list[tuple[float, ...]]:
    returns = [_returns(completion, whole) for completion, whole in zip(group, rewards.tolist(), strict=True)]
    advantages: list[list[float]] = [[] for _ in group]
    for turn in range(max(map(len, returns))):
        members = [number for number, own in enumerate(returns) if len(own) > turn]
        if len(members) > 1:
            row = torch.tensor([[returns[number][turn] for number in members]], dtype=torch.float64)
            values = estimator(row)[0].tolist()
        else:
            values = [advantages[number][0] for number in members]
        for number, value in zip(members, values, strict=True):
            advantages[number].append(value)
    return [tuple(own) for own in advantages]


def _returns(completion: Completion, whole: float) -> list[float]:
    dialogue = completion.dialogue
    turns = sum(message["role"] == "assistant" for message in dialogue.messages) if dialogue is not None else 1
    own = dialogue.turn_rewards if dialogue is not None else ()
    own = own or (0.0,) * turns
    return [whole + sum(own[turn:]) for turn in range(turns)]
