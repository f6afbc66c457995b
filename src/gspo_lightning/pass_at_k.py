"""Advantages for the best of k: a group is worth what the best completion of a random k of it is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gspo_lightning.advantages import ROUNDING, STD_EPSILON, AdvantageEstimator, silent_groups
from gspo_lightning.errors import UserError


@dataclass(frozen=True)
class PassAtK(AdvantageEstimator):
    """``(E[max of k | i among them] - E[max of k]) / scale``, over all ways to choose k completions of the group.

    For rewards of 0 and 1 that is Pass@k Training (arXiv 2508.10751, section 2.4) in closed form: right completions
    share what they add to pass@k, which is little where many are right already. A group in which any k completions
    have a right one among them has advantages of exactly zero, and so has one without any. Other rewards are ranked,
    and the same sums taken over their order statistics.
    """

    scale_rewards: Literal["group", "none"] = "group"
    """Divide by the standard deviation of the best of k in the group, or not at all."""
    baseline: Literal["mean"] = field(default="mean", init=False)
    """The best of any k: no choice."""
    k: int = 4
    """Completions of which the best one counts; at least 2, and fewer than the group has."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UserError(f"advantages.k={self.k} must be at least 2; set advantages=group to compare single ones")
        if self.scale_rewards not in ("group", "none"):
            raise UserError(
                f"advantages.scale_rewards={self.scale_rewards} is not defined for the best of k; set it to group or "
                "none"
            )

    @property
    def takes_turns(self) -> bool:
        """False: only some dialogues of a group have a turn."""
        return False

    def silent(self, rewards: Tensor) -> Tensor:
        """Mask ``(B,)`` of the groups in which the best of any k is the same."""
        return silent_groups(rewards.sort(dim=1).values[:, self.k - 1 :])

    def check_generations(self, num_generations: int) -> None:
        """Refuses groups that are no larger than k: all would be chosen, and every advantage would be 0."""
        if num_generations <= self.k:
            raise UserError(
                f"advantages.k={self.k} with rollout.num_generations={num_generations}: the best of {self.k} can only "
                "be compared in larger groups; lower k or raise num_generations"
            )

    def __call__(self, rewards: Tensor, everyone: Tensor | None = None) -> Tensor:
        """Turns rewards into advantages.

        Args:
            rewards: ``(B, G)``; G must be above k.
            everyone: not used.

        Returns:
            ``(B, G)`` advantages, which add up to 0 in each group.
        """
        self.check_generations(rewards.shape[1])
        ordered, order = rewards.sort(dim=1)
        is_best, own, later = (weights.to(rewards) for weights in _weights(rewards.shape[1], self.k))
        mean = (ordered * is_best).sum(dim=1, keepdim=True)
        above = (ordered * later).flip(1).cumsum(1).flip(1) - ordered * later
        centred = ordered * own + above - mean
        centred = centred.masked_fill(centred.abs() <= ROUNDING * rewards.abs().amax(dim=1, keepdim=True), 0.0)
        if self.scale_rewards == "group":
            spread = ((ordered - mean).square() * is_best).sum(dim=1, keepdim=True).sqrt()
            centred = centred / (spread + STD_EPSILON)
        return torch.empty_like(centred).scatter(1, order, centred)


def _weights(count: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """By rank, from the lowest reward: in what share of all choices of k a completion is the best; of the choices that
    it is in; and of those that a given lower one is in.
    """
    every, of_one = math.comb(count, k), math.comb(count - 1, k - 1)
    return (
        torch.tensor([math.comb(rank, k - 1) / every for rank in range(count)], dtype=torch.float64),
        torch.tensor([math.comb(rank, k - 1) / of_one for rank in range(count)], dtype=torch.float64),
        torch.tensor([math.comb(max(rank - 1, 0), k - 2) / of_one for rank in range(count)], dtype=torch.float64),
    )
