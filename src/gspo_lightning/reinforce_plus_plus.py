"""Advantages against the whole batch, token by token, instead of against the group: REINFORCE++."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gspo_lightning.advantages import ROUNDING, AdvantageEstimator, silent_groups
from gspo_lightning.errors import UserError

VARIANCE_EPSILON = 1e-8
"""Added to the variance, as verl does, so that recipes carry over."""


@dataclass(frozen=True)
class ReinforcePlusPlus(AdvantageEstimator):
    """``(a - mean) / std``, both over all sampled tokens of the rollout, on all ranks (REINFORCE++, arXiv 2501.03262).

    ``a`` is the reward, so that prompts with a single completion can be trained on; or, with ``group_baseline``, its
    difference to the group's mean (REINFORCE++-baseline). A completion counts as often as it has tokens.
    """

    scale_rewards: Literal["batch"] = field(default="batch", init=False)
    """No choice."""
    baseline: Literal["mean"] = field(default="mean", init=False)
    """No choice."""
    group_baseline: bool = False
    """Subtract the group's mean first."""

    @property
    def takes_turns(self) -> bool:
        """False: the batch is one of whole completions."""
        return False

    def silent(self, rewards: Tensor) -> Tensor:
        """Mask ``(B,)`` of the groups of equal rewards; without ``group_baseline`` they teach as much as others."""
        return silent_groups(rewards) & self.group_baseline

    def check_generations(self, num_generations: int) -> None:
        """Refuses groups of one where a completion is compared with its group first."""
        if self.group_baseline and num_generations < 2:
            raise UserError(
                f"advantages.group_baseline=true with rollout.num_generations={num_generations}: every difference to "
                "the group's mean would be 0; raise it to 2 or more, or set group_baseline to false"
            )

    def check_draws(self) -> None:
        """Refuses dynamic sampling without ``group_baseline``, which would find no group to draw anew."""
        if not self.group_baseline:
            raise UserError(
                "dynamic_sampling.max_draws draws groups of equal rewards anew, which teach as much as others with "
                "advantages.group_baseline=false; set max_draws to 0, or group_baseline to true"
            )

    def __call__(self, rewards: Tensor, everyone: Tensor | None = None) -> Tensor:
        """Raises UserError: without lengths there are no tokens to average over; see `of_rollout`."""
        raise UserError(f"{type(self).__name__} was called without lengths; call of_rollout")

    def of_rollout(self, rewards: Tensor, lengths: Tensor, *everyone: Tensor) -> Tensor:
        """Turns rewards into advantages.

        Args:
            rewards: ``(B, G)``.
            lengths: ``(B, G)`` int64 tokens that the policy sampled of each completion.
            everyone: rewards and lengths ``(N,)`` of the whole batch, group by group, if those are one rank's share.

        Returns:
            ``(B, G)`` advantages, of mean 0 and variance 1 over the batch's tokens.
        """
        all_rewards, all_lengths = everyone or (rewards.flatten(), lengths.flatten())
        values = self._centred(all_rewards.view(-1, rewards.shape[1])).flatten()
        count = all_lengths.sum()
        mean = (values * all_lengths).sum() / count
        variance = ((values - mean).square() * all_lengths).sum() / (count - 1).clamp(min=1)
        above = self._centred(rewards) - mean
        above = above.masked_fill(above.abs() <= ROUNDING * all_rewards.abs().amax(), 0.0)
        return above * torch.rsqrt(variance + VARIANCE_EPSILON)

    def _centred(self, rewards: Tensor) -> Tensor:
        return rewards - rewards.mean(dim=1, keepdim=True) if self.group_baseline else rewards
