"""What a loss does, tried on a few tokens, since nothing is known of one by its name: whether it has a gradient where
the advantage is 0, and which of its settings act where the policy has not moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gspo_lightning.objective.objective import Objective

_LOG_RATIOS = (-4.0, 4.0, -1.0, 1.0, 0.3, -0.2, 0.0, 0.7, 0.05, -0.01)
_ADVANTAGES = (1.5, -0.7, 0.0, 0.3, 2.0, 2.0, 2.0, -1.0, -1.0, -1.0)
_LENGTHS = (1, 1, 1, 1, 3, 3)
_NONE = (0.0,) * len(_LOG_RATIOS)


def vanishes_without_advantage(objective: Objective) -> bool:
    """Whether the loss of completions of advantage 0 has no gradient, of tokens more and less likely than before."""
    try:
        gradient = _gradient(objective, _LOG_RATIOS, _NONE)
    except Exception:  # noqa: BLE001
        # It may need what only a real micro-batch has; to forward every completion is right for any loss.
        return False
    # NaN, of a loss that divides by the advantage, would make the step's gradient NaN too: such completions stay out.
    return gradient is None or not gradient.nan_to_num(nan=0.0).any()


def acts_on_policy(objective: Objective, key: str) -> bool:
    """Whether a setting of a loss of the package changes the gradient of tokens whose ratio is exactly 1."""
    usual = replace(objective, **{key: getattr(type(objective), key)})
    own, other = (_gradient(which, _NONE, _ADVANTAGES) for which in (objective, usual))
    return own is None or other is None or not torch.allclose(own, other, rtol=1e-9, atol=0.0)


@torch.enable_grad()
def _gradient(objective: Objective, log_ratios: Sequence[float], advantages: Sequence[float]) -> Tensor | None:
    """Of the summed losses of these tokens, with respect to their log-probabilities; None if the loss returns none,
    which is refused when it is called."""
    old = torch.full((len(log_ratios),), -1.5, dtype=torch.float64, device="cpu")
    logprobs = (old + old.new_tensor(log_ratios)).requires_grad_()
    lengths = torch.tensor(_LENGTHS, device="cpu")
    index = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    x = objective.inputs(logprobs, logprobs - old, old.new_tensor(advantages), index, lengths)
    losses = objective.spec.function(x)
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(losses.sum(), x.logprobs, allow_unused=True, materialize_grads=True)
    return gradient
