"""Which tokens a loss chooses by what they add to the covariance of log-probability and advantage (arXiv 2505.22617).

``c_t = (log pi(y_t) - mean log pi) (A_t - mean A)`` is large for a likely token of a good completion and for an
unlikely one of a bad completion: the tokens that take entropy from the policy. Means, shares and draws are of a whole
minibatch over all ranks (`gspo_lightning.training.choice`), so they do not depend on how it was cut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gspo_lightning.objective.selection import TIE


def covariances(logprobs: Tensor, advantages: Tensor, sums: Tensor) -> Tensor:
    """``c_t`` of tokens, ``(L,)`` float64.

    Args:
        logprobs: ``(L,)`` of the policy, without gradient.
        advantages: ``(L,)``.
        sums: ``(3,)`` float64: of log-probabilities, advantages and ones, over all tokens that are compared.
    """
    mean_logprob, mean_advantage = (sums[:2] / sums[2].clamp(min=1)).unbind()
    return (logprobs.double() - mean_logprob) * (advantages.double() - mean_advantage)


def share_of(count: int, share: float) -> int:
    """Whole tokens in a share of ``count``, at least one: ``floor``, where the product of a decimal share may be a
    little below the whole number that it is, as 0.29 * 100."""
    return max(1, math.floor(share * count + 1e-9))


def top_covariance_threshold(values: Tensor, share: float) -> Tensor:
    """The least covariance that belongs to the highest ``share``: a scalar, infinity for no tokens.

    Args:
        values: ``(N,)`` of all tokens that are compared. Completions of one prompt often begin with the same tokens and
            have the same advantage: values whose relative difference is at most `selection.TIE` are ties, all chosen.
        share: in (0, 1].
    """
    if not len(values):
        return values.new_tensor(torch.inf)
    least = values.topk(share_of(len(values), share)).values[-1]
    return least - TIE * least.abs()


def draw_threshold(uniforms: Tensor, count: int) -> Tensor:
    """Draws ``count`` tokens without replacement: those whose uniform is at most this scalar, -1 for no tokens.

    Args:
        uniforms: ``(N,)`` in [0, 1) of all tokens to draw from, one of each token's own.
        count: how many; all if there are no more.
    """
    if not len(uniforms):
        return uniforms.new_tensor(-1.0)
    return uniforms.kthvalue(min(count, len(uniforms))).values
