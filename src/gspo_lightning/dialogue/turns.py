"""Advantages per turn: what came after a turn, compared with the same turn of the other dialogues of the group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gspo_lightning.advantages import AdvantageEstimator, checked_advantages, checked_silent, without_rounding
from gspo_lightning.types import Completion


def turn_advantages(
    completions: list[list[Completion]], rewards: torch.Tensor, estimator: AdvantageEstimator
) -> list[list[tuple[float, ...]] | None] | None:
    """Advantages of every turn of every dialogue; None for a group without rewards of turns, and if none has any.

    The return of turn t is the sum of the turn rewards from t on, plus the reward of the whole dialogue (``rewards``,
    from the reward functions). It is compared among the dialogues of the group that have a turn t; a turn that no
    other dialogue reached has the advantage of its dialogue's first turn. Groups of one are for estimators that need no
    others (`check_group`): these get every turn. What other groups have changes nothing: which of them share a rollout
    and a rank is chance.

    Args:
        completions: B lists of G.
        rewards: ``(B, G)`` float64.
        estimator: compares within a group.
    """
    if not has_turn_rewards(completions):
        return None
    return [
        _of_group(group, rewards[number], estimator) if has_turn_rewards([group]) else None
        for number, group in enumerate(completions)
    ]


def has_turn_rewards(completions: list[list[Completion]]) -> bool:
    """Whether an environment has rewarded turns."""
    return any(c.dialogue is not None and c.dialogue.turn_rewards for group in completions for c in group)


def silent_rollout(
    completions: list[list[Completion]], rewards: torch.Tensor, estimator: AdvantageEstimator | None = None
) -> torch.Tensor:
    """Groups without signal, ``(B,)`` bool: those whose `returns` are equal in every turn, so advantages are zero.

    Args:
        completions: B lists of G.
        rewards: ``(B, G)``.
        estimator: says what gives no signal; None for equal returns alone.
    """
    estimator = estimator or AdvantageEstimator()
    silent = checked_silent(estimator, rewards).clone()
    for number, group in enumerate(completions):
        if has_turn_rewards([group]):
            turns = _by_turn(group, rewards[number])
            silent[number] = all(checked_silent(estimator, of_turn).item() for _, of_turn in turns)
    return silent


def _by_turn(group: list[Completion], rewards: torch.Tensor) -> Iterator[tuple[list[int], torch.Tensor]]:
    """For each turn, the M dialogues that have it and their returns ``(1, M)``.

    Returns that only rounding tells apart are equal: 0.1 + 0.2 in two turns is 0.3 in one.
    """
    own = [returns(completion, whole) for completion, whole in zip(group, rewards.tolist(), strict=True)]
    sizes = [returns(completion, whole, abs) for completion, whole in zip(group, rewards.tolist(), strict=True)]
    for turn in range(max(map(len, own))):
        members = [number for number, of_one in enumerate(own) if len(of_one) > turn]
        values, size = (
            torch.tensor([[of_one[number][turn] for number in members]], dtype=torch.float64) for of_one in (own, sizes)
        )
        yield members, without_rounding(values, size)


def returns(completion: Completion, whole: float, of: Callable[[float], float] = float) -> list[float]:
    """For each turn, its reward plus those of later turns and of the whole; without turns, the last of these alone.

    Args:
        completion: with or without turns.
        whole: its reward as a whole.
        of: taken of each of these rewards before they are added up; ``abs`` gives the size of the sum's terms.
    """
    dialogue = completion.dialogue
    turns = dialogue.num_turns if dialogue is not None else 1
    own = (dialogue.turn_rewards if dialogue is not None else ()) or (0.0,) * turns
    return [of(whole) + sum(map(of, own[turn:])) for turn in range(turns)]


def whole_returns(completions: list[list[Completion]], rewards: torch.Tensor) -> torch.Tensor:
    """``(B, G)`` float64 returns of the first turn: all that a completion earned, its turns' rewards included."""
    groups = zip(completions, rewards.tolist(), strict=True)
    return torch.tensor(
        [[returns(completion, whole)[0] for completion, whole in zip(*group, strict=True)] for group in groups],
        dtype=torch.float64,
    )


def _of_group(group: list[Completion], rewards: torch.Tensor, estimator: AdvantageEstimator) -> list[tuple[float, ...]]:
    advantages: list[list[float]] = [[] for _ in group]
    for members, values in _by_turn(group, rewards):
        if len(members) == 1 and len(group) > 1:
            of_turn = [advantages[number][0] for number in members]
        else:
            of_turn = checked_advantages(estimator, values, estimator(values))[0].tolist()
        for number, value in zip(members, of_turn, strict=True):
            advantages[number].append(value)
    return [tuple(own) for own in advantages]
