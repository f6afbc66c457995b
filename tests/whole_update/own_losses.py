"""Losses that a user brings, each as the package takes it and once more as an equation of one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspo_lightning import LossSpec
from gspo_lightning.objective.losses import SURROGATE_CLIP, LossFunction, LossInputs, clipped_surrogate

if TYPE_CHECKING:
    from tests.whole_update.case import Case

ANY = ("token", "sequence", "sequence_token")


@dataclass(frozen=True)
class Token:
    """What the equation of a token reads."""

    ratio: Tensor
    log_ratio: Tensor
    logprob: Tensor
    advantage: float
    epsilon: float
    epsilon_high: float
    delta: float | None
    tau: float


@dataclass(frozen=True)
class OwnLoss:
    """A loss, and what the reference knows of it."""

    given: LossSpec | LossFunction
    """As ``objective.loss_type``."""
    equation: Callable[[Token], Tensor]
    average: str
    """As in `reference_losses.Equation`."""
    levels: tuple[str, ...]
    reads: tuple[str, ...]
    widths: tuple[float, float] | None = None
    """Its clip widths; None for those of the level."""
    clips: bool = False
    """Whether it clips where ``grpo`` does."""
    free_of_zeros: bool = True
    """Whether a completion of advantage 0 has no gradient."""
    is_function: bool = False

    def by_token(self, case: Case) -> bool:
        """Whether tokens can be left out one by one."""
        return case.level != "sequence" or self.is_function


def capped(x: LossInputs) -> Tensor:
    """The example of docs/objectives/README.md."""
    return -x.ratio.clamp(max=1 + x.epsilon_high) * x.advantages


def gated(x: LossInputs) -> Tensor:
    return -x.advantages * torch.sigmoid(x.tau_positive * x.ratio)


def anchored(x: LossInputs) -> Tensor:
    """With a term that holds the policy back whatever the advantage."""
    return clipped_surrogate(x) + x.log_ratio.square() / 2


def forgetting(x: LossInputs) -> Tensor:
    """With a term that lowers every token, from the first step on."""
    return -x.ratio * x.advantages + 0.1 * x.logprobs


def _capped(x: Token) -> Tensor:
    return -min(x.ratio, x.ratio.new_tensor(1 + x.epsilon_high)) * x.advantage


def _anchored(x: Token) -> Tensor:
    low, high = x.ratio.new_tensor(1 - x.epsilon), x.ratio.new_tensor(1 + x.epsilon_high)
    top = x.ratio if x.delta is None else min(x.ratio, x.ratio.new_tensor(x.delta))
    first, second = top * x.advantage, max(low, min(high, x.ratio)) * x.advantage
    return -min(first, second) + x.log_ratio * x.log_ratio / 2


OWN: dict[str, OwnLoss] = {
    "capped": OwnLoss(
        LossSpec(capped, "tokens", clip=None, reads=("epsilon_high",), levels=("token",), epsilons=(0.0, 0.3)),
        _capped, "tokens", ("token",), ("epsilon_high",), widths=(0.0, 0.3),
    ),
    "capped alone": OwnLoss(capped, _capped, "sequence_mean", ANY, ("epsilon", "epsilon_high"), is_function=True),
    "gated": OwnLoss(
        LossSpec(gated, "sequence_sum", None, ("tau_positive",), ("token", "sequence")),
        lambda x: -x.advantage / (1 + torch.exp(-x.tau * x.ratio)), "sequence_sum", ("token", "sequence"), ("tau_positive",),
    ),
    "anchored": OwnLoss(
        LossSpec(anchored, "max_tokens", SURROGATE_CLIP, shares_one_loss=False),
        _anchored, "max_tokens", ("token",), ("epsilon", "epsilon_high", "delta"), clips=True, free_of_zeros=False,
    ),
    "forgetting": OwnLoss(
        LossSpec(forgetting, "tokens", None, ()),
        lambda x: -x.ratio * x.advantage + 0.1 * x.logprob, "tokens", ("token",), (), free_of_zeros=False,
    ),
}  # fmt: skip
