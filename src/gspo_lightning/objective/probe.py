"""Whether a loss has a gradient where the advantage is 0: tried on a few tokens, since a user brings any loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gspo_lightning.objective.losses import LossInputs
    from gspo_lightning.objective.objective import Objective

_LOG_RATIOS = (-4.0, 4.0, -1.0, 1.0, 0.3, -0.2, 0.0, 0.7, 0.05, -0.01)
_LENGTHS = (1, 1, 1, 1, 3, 3)


@torch.enable_grad()
def vanishes_without_advantage(objective: Objective) -> bool:
    """Whether the loss of completions of advantage 0 has no gradient, of tokens more and less likely than before."""
    x = _inputs(objective)
    try:
        losses = objective.spec.function(x)
    except Exception:  # noqa: BLE001
        # It may need what only a real micro-batch has; to forward every completion is right for any loss.
        return False
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        return True  # refused when it is called
    (gradient,) = torch.autograd.grad(losses.sum(), x.logprobs, allow_unused=True, materialize_grads=True)
    # NaN, of a loss that divides by the advantage, would make the step's gradient NaN too: such completions stay out.
    return not gradient.nan_to_num(nan=0.0).any()


def _inputs(objective: Objective) -> LossInputs:
    """Completions of advantage 0, of tokens far from the old policy and near it."""
    old = torch.full((len(_LOG_RATIOS),), -1.5, dtype=torch.float64, device="cpu")
    logprobs = (old + old.new_tensor(_LOG_RATIOS)).requires_grad_()
    lengths = torch.tensor(_LENGTHS, device="cpu")
    index = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    return objective.inputs(logprobs, logprobs - old, torch.zeros_like(old), index, lengths)
