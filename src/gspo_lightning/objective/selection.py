"""Which tokens and sequences the policy term is computed on. What is left out stays in the denominator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gspo_lightning.objective.ratios import sequence_mean

TIE = 1e-5
"""Entropies whose relative difference is at most this are equal: the rounding of a float32 forward. The first tokens of
a prompt's completions have one distribution, computed in several rows of a product."""


def top_entropy_threshold(entropies: Tensor, quantile: float) -> Tensor:
    """The least entropy with which a token belongs to the top ``quantile`` (arXiv 2506.01939, section 5).

    Args:
        entropies: ``(N,)`` of all tokens that are compared: those of a whole minibatch, over all ranks.
        quantile: share to keep, in (0, 1]; at least one token is kept. Ties at the threshold (`TIE`) are all kept.

    Returns:
        A scalar: the ``ceil(quantile N)``-th largest entropy less ``TIE`` of it, infinity for no tokens.
    """
    if not len(entropies):
        return entropies.new_tensor(torch.inf)
    # The product of a decimal share may be a little above the whole number that it is: 0.07 * 100.
    count = max(1, math.ceil(quantile * len(entropies) - 1e-9))
    return entropies.topk(count).values[-1] * (1 - TIE)


def near_old_policy(
    log_ratio: Tensor, advantages: Tensor, sequence_index: Tensor, lengths: Tensor, threshold: float
) -> Tensor:
    """Tokens that the off-policy mask keeps (DeepSeek-V3.2, arXiv 2512.02556, Eq. 9), as ``(L,)`` bool.

    A token is left out if its advantage is negative and the policy has moved away from its sequence since that was
    sampled: ``mean_t (log pi_old - log pi) > threshold``. Without rewards of turns that is a whole sequence.

    Args:
        log_ratio: ``(L,)`` ``log pi - log pi_old``.
        advantages: ``(L,)``.
        sequence_index: ``(L,)`` in [0, S).
        lengths: ``(S,)``.
        threshold: in nats per token.
    """
    drift = -sequence_mean(log_ratio.detach(), sequence_index, lengths)
    return (advantages >= 0) | (drift <= threshold)[sequence_index]
