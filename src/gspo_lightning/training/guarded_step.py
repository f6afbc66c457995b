"""The optimizer step: parameter groups, clipping, and the treatment of non-finite gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gspo_lightning.distributed.ranks import whole
from gspo_lightning.errors import NonFiniteGradientError
from gspo_lightning.screen import counted


class Steppable(Protocol):
    """The part of an optimizer used here; Lightning wraps torch's."""

    def step(self) -> Any:
        """Updates the weights from their gradients."""

    def zero_grad(self) -> None:
        """Clears the gradients."""


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The trained parameters in two groups: matrices, and vectors (norms, biases) without weight decay."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.ndim >= 2]}]
    if vectors := [p for p in trained if p.ndim < 2]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


class GuardedStep:
    """Clips the gradient and steps; discards a non-finite gradient, and raises after too many in a row.

    Args:
        max_grad_norm: L2 norm over all parameters that a gradient is scaled down to.
        max_nonfinite_steps: number of consecutive skipped steps that ends the run.
    """

    def __init__(self, max_grad_norm: float, max_nonfinite_steps: int) -> None:
        self.max_grad_norm, self.max_nonfinite_steps = max_grad_norm, max_nonfinite_steps
        self.nonfinite_in_a_row = 0

    def __call__(
        self,
        optimizer: Steppable,
        parameters: Iterable[nn.Parameter],
        rollout: int,
        after_step: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Steps and clears the gradients.

        Args:
            optimizer: steps at least these parameters.
            parameters: those whose gradients are clipped and checked.
            rollout: number of the current rollout, for the message.
            after_step: called after the step, before the gradients are cleared; not if the gradient was discarded.

        Returns:
            The norm before clipping, or None if the gradient was discarded.

        Raises:
            NonFiniteGradientError: this was the last of ``max_nonfinite_steps`` in a row.
        """
        with_gradient = [p for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        norm = whole(total)
        finite = bool(torch.isfinite(norm))
        if finite:
            # Otherwise the factor would be 1, and the pass over all gradients would change nothing.
            if norm + 1e-6 > self.max_grad_norm:
                nn.utils.clip_grads_with_norm_(with_gradient, self.max_grad_norm, total)
            optimizer.step()
            if after_step is not None:
                after_step()
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        optimizer.zero_grad()
        # If autocast caches casts (Lightning's does not), they are stale: the weights have changed.
        torch.clear_autocast_cache()
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteGradientError(
                f"{counted(self.nonfinite_in_a_row, 'optimizer step')} in a row had a non-finite gradient "
                f"(rollout {rollout}); they did not change the weights. Lower optimizer.lr or check the rewards."
            )
        return norm if finite else None
