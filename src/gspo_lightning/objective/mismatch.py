"""Corrections for a sampler that is not quite the trainer: other kernels, lower precision, or older weights.

Completions are drawn from the sampler's distribution ``mu``; the loss is written for the trainer's ``pi_old``. With
``d_t = log pi_old(y_t) - log mu(y_t)`` the importance weight that makes up for it is, at level

* ``token``: ``w_t = exp(d_t)``, the truncated importance sampling of most trainers ("TIS", Yao et al. 2025,
  https://fengyao.notion.site/off-policy-rl); masked on both sides it is IcePop (Ring-1T, arXiv 2510.18855);
* ``sequence``: ``w = exp(sum_t d_t)``, unbiased for a whole completion, and of high variance for long ones;
* ``sequence_mean``: ``w = exp(mean_t d_t)``, its length-normalised form, as GSPO's own ratio is.

``truncate`` caps the weight at ``high``; ``mask`` leaves out what lies outside ``[low, high]`` and weighs the rest by
``w``. What is masked stays in the denominator of the loss. Weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gspo_lightning.errors import UserError, check_choice
from gspo_lightning.objective.ratios import sequence_mean
from gspo_lightning.types import Metrics


@dataclass(frozen=True)
class MismatchCorrection:
    """Weights of the policy term by how likely the sampler's tokens are to the trainer."""

    level: Literal["token", "sequence", "sequence_mean"]
    how: Literal["truncate", "mask"]
    high: float
    """Cap (``truncate``), or the largest weight that counts (``mask``)."""
    low: float = 0.0
    """The smallest weight that counts (``mask``)."""

    def __post_init__(self) -> None:
        check_choice("objective.mismatch.level", self.level, ("token", "sequence", "sequence_mean"))
        check_choice("objective.mismatch.how", self.how, ("truncate", "mask"))
        if not self.high >= 1.0 or not 0.0 <= self.low <= 1.0:
            raise UserError(f"objective.mismatch: low={self.low} <= 1 <= high={self.high} must hold, low at least 0")
        if self.how == "truncate" and self.low:
            raise UserError(f"objective.mismatch.low={self.low} has no effect with how=truncate; set it to 0")

    @torch.no_grad()
    def __call__(
        self, old_logprobs: Tensor, sampler_logprobs: Tensor, sequence_index: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Weights ``(L,)`` and metrics of the raw weights, before any cap or mask.

        Args:
            old_logprobs: ``(L,)`` of the trainer for the weights that sampled.
            sampler_logprobs: ``(L,)`` of the sampler.
            sequence_index: ``(L,)`` in [0, S).
            lengths: ``(S,)`` tokens per sequence.
        """
        difference = (old_logprobs - sampler_logprobs.to(old_logprobs.dtype)).detach()
        if self.level == "token":
            raw = difference.exp()
        else:
            mean = sequence_mean(difference, sequence_index, lengths)
            raw = (mean * lengths.to(mean.dtype) if self.level == "sequence" else mean).exp()
        if self.how == "truncate":
            acted, weights = raw > self.high, raw.clamp(max=self.high)
        else:
            acted = (raw < self.low) | (raw > self.high)
            weights = raw.masked_fill(acted, 0.0)
        count = torch.tensor(float(raw.numel()), dtype=torch.float64)
        metrics: Metrics = {
            "mismatch/weight_mean": (raw.double().sum(), count),
            f"mismatch/{'capped' if self.how == 'truncate' else 'masked'}_frac": (acted.double().sum(), count),
        }
        return weights if self.level == "token" else weights[sequence_index], metrics
