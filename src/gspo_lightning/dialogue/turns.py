"""Advantages per turn: what came after a turn, compared with the same turn of the other dialogues of the group."""

from __future__ import annotations

import torch

from gspo_lightning.advantages import AdvantageEstimator, silent_groups
from gspo_lightning.types import Completion


def turn_advantages(
    completions: list[list[Completion]], rewards: torch.Tensor, estimator: AdvantageEstimator
) -> list[list[tuple[float, ...]]] | None:
    """Advantages of every turn of every dialogue, or None if no environment rewards turns.

    The return of turn t is the sum of the turn rewards from t on, plus the reward of the whole dialogue (``rewards``,
    from the reward functions). It is compared among the dialogues of the group that have a turn t; a turn that no
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
    """Groups without signal, ``(B,)`` bool: those whose `returns` are equal in every turn, so advantages are zero.

    Args:
        completions: B lists of G.
        rewards: ``(B, G)``.
    """
    groups = zip(completions, rewards.tolist(), strict=True)
    silent = [
        all(silent_groups(torch.tensor([of_turn], dtype=torch.float64)).item() for of_turn in _by_turn(*group))
        for group in groups
    ]
    return torch.tensor(silent, dtype=torch.bool)


def _by_turn(group: list[Completion], rewards: list[float]) -> list[list[float]]:
    """For each turn, the returns of the dialogues that have it."""
    own = [returns(completion, whole) for completion, whole in zip(group, rewards, strict=True)]
    return [[of_one[turn] for of_one in own if len(of_one) > turn] for turn in range(max(map(len, own)))]


def returns(completion: Completion, whole: float) -> list[float]:
    """For each turn, its reward plus those of later turns and of the whole; without turns, the last of these alone."""
    dialogue = completion.dialogue
    turns = dialogue.num_turns if dialogue is not None else 1
    own = (dialogue.turn_rewards if dialogue is not None else ()) or (0.0,) * turns
    return [whole + sum(own[turn:]) for turn in range(turns)]


def whole_returns(completions: list[list[Completion]], rewards: torch.Tensor) -> torch.Tensor:
    """``(B, G)`` float64 returns of the first turn: all that a completion earned, its turns' rewards included."""
    groups = zip(completions, rewards.tolist(), strict=True)
    return torch.tensor(
        [[returns(completion, whole)[0] for completion, whole in zip(*group, strict=True)] for group in groups],
        dtype=torch.float64,
    )


def _of_group(group: list[Completion], rewards: torch.Tensor, estimator: AdvantageEstimator) -> list[tuple[float, ...]]:
    own_returns = [returns(completion, whole) for completion, whole in zip(group, rewards.tolist(), strict=True)]
    advantages: list[list[float]] = [[] for _ in group]
    for turn in range(max(map(len, own_returns))):
        members = [number for number, own in enumerate(own_returns) if len(own) > turn]
        if len(members) > 1:
            row = torch.tensor([[own_returns[number][turn] for number in members]], dtype=torch.float64)
            values = estimator(row)[0].tolist()
        else:
            values = [advantages[number][0] for number in members]
        for number, value in zip(members, values, strict=True):
            advantages[number].append(value)
    return [tuple(own) for own in advantages]
