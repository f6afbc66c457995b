"""Group-relative advantages: how much better a completion is than the others for the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from gspo_lightning.errors import UserError, check_choice

STD_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does, so that recipes carry over."""

ROUNDING = 1e-12
"""Rewards are equal if their difference, relative to the size of their summands, is at most this: 0.1 + 0.2 is 0.3."""


@dataclass(frozen=True)
class AdvantageEstimator:
    """``(r - baseline) / scale`` within groups (GRPO, arXiv 2402.03300, section 4.1.2).

    A reward that equals the baseline gets exactly zero, whatever the rounded mean is: the mean of 0.1, 0.2 and 0.3 is
    not quite 0.2. So does a whole group whose rewards are all equal (`silent_groups`).

    A subclass with ``state_dict()`` and ``load_state_dict(state)`` may keep something from rollout to rollout.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide by the unbiased standard deviation of the group, of the batch on all ranks, or not at all (Dr. GRPO)."""
    baseline: Literal["mean", "rloo", "length"] = "mean"
    """The group's mean, the mean of the others (leave one out, arXiv 2402.14740), or the mean weighted by the lengths
    of the completions (OPO, arXiv 2505.23585): of least variance where the squared gradient grows with the length."""

    def __post_init__(self) -> None:
        if type(self).__call__ is AdvantageEstimator.__call__:  # one of a user's own may have choices of its own
            for key, of_type in get_type_hints(AdvantageEstimator).items():
                check_choice(f"advantages.{key}", getattr(self, key), get_args(of_type))

    @property
    def weighs_by_length(self) -> bool:
        """Whether the baseline is weighted by lengths, which only whole completions have."""
        return self.baseline == "length" and type(self).__call__ is AdvantageEstimator.__call__

    @property
    def takes_turns(self) -> bool:
        """Whether turns with rewards of their own can be compared one by one, as if each were a completion."""
        return not self.weighs_by_length

    def silent(self, rewards: Tensor) -> Tensor:
        """Mask ``(B,)`` of the groups whose rewards ``(B, G)`` give nothing to learn: by default, equal ones."""
        return silent_groups(rewards)

    def check_generations(self, num_generations: int) -> None:
        """Raises UserError if groups of so many completions cannot be compared, for a reason of a subclass's own."""

    def check_draws(self) -> None:
        """Raises UserError if dynamic sampling has no effect with this estimator, for a reason of a subclass's own."""

    def __call__(self, rewards: Tensor, everyone: Tensor | None = None) -> Tensor:
        """Turns rewards into advantages.

        Args:
            rewards: ``(B, G)``; G must be at least 2.
            everyone: ``(N,)`` rewards of the whole batch, if ``rewards`` are one rank's share of it.

        Returns:
            ``(B, G)`` advantages.

        Raises:
            UserError: the baseline is weighted by lengths, which are not known here.
        """
        if self.baseline == "length":
            raise UserError(
                f"advantages.baseline=length: {type(self).__name__} was called without lengths; call of_rollout, or "
                "override it in a subclass"
            )
        return self._compared(rewards, rewards.mean(dim=1, keepdim=True), everyone)

    def of_rollout(self, rewards: Tensor, lengths: Tensor, *everyone: Tensor) -> Tensor:
        """Advantages of a rollout: `__call__`, unless lengths matter. A subclass to which they do overrides this.

        Args:
            rewards: ``(B, G)``.
            lengths: ``(B, G)`` int64 tokens that the policy sampled of each completion.
            everyone: rewards and lengths ``(N,)`` of the whole batch, group by group; with ``scale_rewards="batch"``
                alone.
        """
        if not self.weighs_by_length:
            return self(rewards, *everyone[:1])
        baseline = (rewards * lengths).sum(dim=1, keepdim=True) / lengths.sum(dim=1, keepdim=True)
        return self._compared(rewards, baseline, *everyone[:1])

    def _compared(self, rewards: Tensor, baseline: Tensor, everyone: Tensor | None = None) -> Tensor:
        count = rewards.shape[1]
        if count < 2:
            raise ValueError("a group needs at least two completions to be compared")
        centred = rewards - baseline
        centred = centred.masked_fill(centred.abs() <= ROUNDING * rewards.abs().amax(dim=1, keepdim=True), 0.0)
        if self.baseline == "rloo":
            centred = centred * (count / (count - 1))
        if self.scale_rewards == "group":
            centred = centred / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
        elif self.scale_rewards == "batch":
            centred = centred / ((rewards if everyone is None else everyone).std() + STD_EPSILON)
        return centred.masked_fill(silent_groups(rewards)[:, None], 0.0)


def checked_advantages(estimator: AdvantageEstimator, rewards: Tensor, values: Tensor) -> Tensor:
    """The ``values`` that an estimator returned for ``rewards``, of which one of the user's own may return anything.

    Raises:
        UserError: it is no tensor of the shape of ``rewards``, or has a number that is not finite.
    """
    name = type(estimator).__name__
    if not isinstance(values, Tensor) or values.shape != rewards.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"advantages: {name} returned {found} for rewards of {tuple(rewards.shape)}; return a tensor of that shape"
        )
    if len(odd := (~values.isfinite()).nonzero()):
        group = rewards[odd[0, 0]].tolist()
        raise UserError(f"advantages: {name} returned a number that is not finite for a group of rewards {group}")
    return values


def checked_silent(estimator: AdvantageEstimator, rewards: Tensor) -> Tensor:
    """``estimator.silent(rewards)``, likewise.

    Raises:
        UserError: it is no mask ``(B,)``.
    """
    mask = estimator.silent(rewards)
    if not isinstance(mask, Tensor) or mask.shape != rewards.shape[:1] or mask.dtype != torch.bool:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            f"advantages: {type(estimator).__name__}.silent returned {found} for rewards of {tuple(rewards.shape)}; "
            f"return a mask of {tuple(rewards.shape[:1])} bool, one for each group"
        )
    return mask


def check_group(advantages: object, num_generations: int, max_draws: int = 0) -> None:
    """Refuses groups of one, unless an estimator of the user's own compares with something else than the group.

    Args:
        advantages: the estimator.
        num_generations: completions per prompt.
        max_draws: of dynamic sampling, which draws groups of equal rewards anew.

    Raises:
        UserError: there is nothing to compare a completion with, or every group would be drawn anew.
    """
    if isinstance(advantages, AdvantageEstimator):
        advantages.check_generations(num_generations)
        if max_draws:
            advantages.check_draws()
    if num_generations >= 2:
        return
    if isinstance(advantages, AdvantageEstimator) and type(advantages).__call__ is AdvantageEstimator.__call__:
        raise UserError(
            f"rollout.num_generations={num_generations} must be at least 2; a group of one has nothing to be compared "
            "with"
        )
    if max_draws:
        raise UserError(
            f"dynamic_sampling.max_draws={max_draws}: every group of rollout.num_generations={num_generations} has "
            "equal rewards and would be drawn anew; set max_draws to 0"
        )


def silent_groups(rewards: Tensor, size: Tensor | None = None) -> Tensor:
    """Mask of the groups without signal, ``(B,)`` bool: all rewards of the group are equal up to `ROUNDING`.

    Args:
        rewards: ``(B, G)``.
        size: ``(B, G)`` summed magnitudes of the rewards' summands; None takes the magnitudes of the rewards.
    """
    size = rewards.abs() if size is None else size
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= ROUNDING * size.amax(dim=1)


def without_rounding(rewards: Tensor, size: Tensor) -> Tensor:
    """The rewards, made exactly equal within each group that `silent_groups` finds; arguments are those."""
    return torch.where(silent_groups(rewards, size)[:, None], rewards[:, :1], rewards)


def combine_rewards(
    by_function: Tensor, weights: Tensor, how: Literal["weighted_sum", "normalize_then_sum"] = "weighted_sum"
) -> Tensor:
    """One reward per completion from several functions; exactly equal within each group that `silent_groups` finds.

    Args:
        by_function: ``(B, G, K)``; NaN where a function does not apply, which leaves it out of the sum.
        weights: ``(K,)``.
        how: ``weighted_sum``, or each function's rewards made zero-mean and unit-variance within the group first
            (GDPO, arXiv 2601.05242), so that no function's scale drowns another's; `check_combination` says what
            the sum is then divided by.

    Raises:
        ValueError: if no function applies to some completion.
    """
    nothing = by_function.isnan().all(dim=-1)
    if nothing.any():
        row, generation = (int(x) for x in nothing.nonzero()[0])
        raise ValueError(f"no reward function applies to completion {generation} of prompt {row} of the rollout")
    if how == "normalize_then_sum":
        mean = by_function.nanmean(dim=1, keepdim=True)
        valid = (~by_function.isnan()).sum(dim=1, keepdim=True)
        variance = (by_function - mean).square().nansum(dim=1, keepdim=True) / (valid - 1).clamp(min=1)
        centred = by_function - mean
        centred = centred.masked_fill(centred.abs() <= ROUNDING * mean.abs(), 0.0)
        by_function = centred / (variance.sqrt() + STD_EPSILON)
    terms = by_function * weights
    return without_rounding(terms.nansum(dim=-1), terms.abs().nansum(dim=-1))


def check_combination(how: str, scale_rewards: str) -> None:
    """Refuses GDPO with a scale other than ``batch``: dividing the sum by the group's std would normalise it twice.

    Raises:
        UserError: ``normalize_then_sum`` with another scale.
    """
    if how == "normalize_then_sum" and scale_rewards != "batch":
        raise UserError(
            f"reward.combine=normalize_then_sum contradicts advantages.scale_rewards={scale_rewards}: its sum is "
            "divided by the spread of the batch (GDPO, TRL); set advantages=batch, or reward.combine=weighted_sum"
        )
