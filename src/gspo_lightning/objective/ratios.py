"""Importance ratios between the policy and the weights that sampled, per token of a flat micro-batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "sequence_token"]

CLIP_WIDTHS: dict[str, tuple[float, float]] = {
    "token": (0.2, 0.27),
    "sequence": (3e-4, 4e-4),
    "sequence_token": (3e-4, 4e-4),
}
"""Default (epsilon, epsilon_high) of each level, from the GSPO paper's section 5.1. A width belongs to its level."""


def sequence_sum(values: Tensor, sequence_index: Tensor, lengths: Tensor) -> Tensor:
    """``(L,)`` -> ``(S,)``: sum over the tokens of each sequence."""
    total = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
    if values.is_cuda:  # there `index_add` adds in no fixed order, and a resumed run would not be bit-identical
        return total.index_put((sequence_index,), values, accumulate=True)
    return total.index_add(0, sequence_index, values)


def sequence_mean(values: Tensor, sequence_index: Tensor, lengths: Tensor) -> Tensor:
    """``(L,)`` -> ``(S,)``: mean over the tokens of each sequence."""
    return sequence_sum(values, sequence_index, lengths) / lengths.to(values.dtype)


def importance_ratio(log_ratio: Tensor, sequence_index: Tensor, lengths: Tensor, level: Level) -> Tensor:
    """The ratio ``(L,)`` that multiplies each token's advantage.

    * ``token`` (GRPO): ``w_it = exp(d_it)`` with ``d_it = log pi(y_it) - log pi_old(y_it)``.
    * ``sequence`` (GSPO, arXiv 2507.18071, Eq. 7): ``s_i = exp(mean_t d_it)``, the same for all tokens of a sequence.
    * ``sequence_token`` (GSPO-token, Eq. 14): ``s_it = sg[s_i] pi(y_it) / sg[pi(y_it)]``: the value of the sequence
      ratio with a gradient per token, for advantages that differ within a sequence.
    """
    if level == "token":
        return log_ratio.exp()
    sequence = sequence_mean(log_ratio, sequence_index, lengths)[sequence_index]
    if level == "sequence":
        return sequence.exp()
    return sequence.detach().exp() * (log_ratio - log_ratio.detach()).exp()
