"""Estimators of the divergence from the reference, per token, from samples of the policy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """``KL(pi || pi_ref)`` estimated at each sampled token (Schulman, "Approximating KL divergence", 2020).

    With ``d = log pi_ref - log pi``: k1 is ``-d`` (unbiased, may be negative), k2 is ``d^2 / 2`` (biased, never
    negative), k3 is ``exp(d) - 1 - d`` (unbiased, never negative).

    The gradient of an estimate is another matter: tokens are drawn from the policy, and only the token ratio of
    ``kl_importance_weighted`` as a weight lets the gradient account for that. On samples of the policy itself the
    gradient is, on average,

    * k1: 0, since the reference is constant; weighted: that of ``KL(pi || pi_ref)``;
    * k2: that of ``KL(pi || pi_ref)``; weighted: that of ``E[d^2] / 2``;
    * k3: that of ``KL(pi_ref || pi)``, as in GRPO; weighted: that of ``KL(pi || pi_ref)``.
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.expm1() - d
