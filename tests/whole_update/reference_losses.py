"""The loss of every token of one completion, token by token: the equations of docs/objectives and their papers.

``d_t = log pi(y_t) - log pi_old(y_t)`` throughout, ``A_t`` is the advantage, ``n`` the number of trained tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.whole_update.own_losses import OWN, Token

if TYPE_CHECKING:
    from tests.whole_update.case import Case

ANY = ("token", "sequence", "sequence_token")
LEVELS = {
    "grpo": ANY,
    "dr_grpo": ANY,
    "bnpo": ANY,
    "dapo": ANY,
    "luspo": ANY,
    "cispo": ("token",),
    "sapo": ("token", "sequence"),
    "gmpo": ("token",),
    "vespo": ("token",),
    "dppo_tv": ("token",),
    "dppo_kl": ("token",),
    "clip_cov": ("token",),
    "kl_cov": ("token",),
    "reinforce": ANY,
}
"""Ratio levels by loss. To ``reinforce``, which has no ratio, the level is the unit of the metrics alone."""

DPPO = ("dppo_tv", "dppo_kl")
"""One mask of a token, two divergences."""

SURROGATES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo")
"""One loss of a token, five averages."""

DEFAULT_WIDTHS = {"token": (0.2, 0.27), "sequence": (3e-4, 4e-4), "sequence_token": (3e-4, 4e-4)}
"""(epsilon, epsilon_high); those of sequences are of GSPO, arXiv 2507.18071, section 5.1."""

WIDTHS_OF_LOSSES = {
    "cispo": (0.0, 5.0), "gmpo": (0.4, 0.4), "dppo_tv": (0.15, 0.15), "dppo_kl": (0.05, 0.05), "clip_cov": (1.0, 1.0),
}  # fmt: skip
"""Those that are no matter of the level (docs/objectives)."""


@dataclass(frozen=True)
class Terms:
    """What the loss of one completion is made of, each ``(n,)``."""

    logprobs: Tensor
    """Under the policy, with gradient."""
    old: Tensor
    """Under the weights that sampled."""
    advantages: Tensor
    sampler: Tensor
    """As the sampler reported them."""
    reference: Tensor | None = None
    entropy: Tensor | None = None
    """Of the policy's distribution, with gradient."""
    selected: Tensor | None = None
    """Bool: tokens that the policy term is computed on."""
    chosen: list[bool] | None = None
    """Tokens of high covariance."""

    @property
    def d(self) -> Tensor:
        return self.logprobs - self.old

    @property
    def length(self) -> int:
        return len(self.logprobs)


def clip_widths(case: Case) -> tuple[float, float]:
    """(epsilon, epsilon_high) in effect: ``epsilon`` alone is meant for both sides (docs/objectives/README.md)."""
    brought = OWN[case.loss].widths if case.loss in OWN else None
    own = brought or WIDTHS_OF_LOSSES.get(case.loss)
    low, high = own or DEFAULT_WIDTHS[case.level]
    if case.epsilon is not None:
        low = high = case.epsilon
    return low, high if case.epsilon_high is None else case.epsilon_high


def shares_one_loss(case: Case) -> bool:
    """Whether all tokens of a completion have one loss, with the gradient of all of them."""
    return case.loss == "gmpo" or (case.level == "sequence" and case.loss not in ("cispo", "reinforce"))


def ratios(case: Case, x: Terms) -> list[Tensor]:
    """The importance ratio that multiplies each token's advantage."""
    d = x.d
    if case.level == "token":  # GRPO, arXiv 2402.03300: w_t = exp(d_t)
        return [d[t].exp() for t in range(x.length)]
    sequence = (d.sum() / x.length).exp()  # GSPO, arXiv 2507.18071, Eq. 7: s = exp(mean_t d_t)
    if case.level == "sequence":
        return [sequence] * x.length
    # GSPO-token, Eq. 14: sg[s] pi(y_t) / sg[pi(y_t)]
    probability = x.logprobs.exp()
    return [sequence.detach() * probability[t] / probability[t].detach() for t in range(x.length)]


def policy_losses(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
    """``(n,)``: the policy term before any selection, mask or correction."""
    if case.loss in OWN:
        return torch.stack([OWN[case.loss].equation(_token(case, x, w, t)) for t in range(x.length)])
    if case.loss in SURROGATES:
        return torch.stack([surrogate(case, w[t], x.advantages[t]) for t in range(x.length)])
    if case.loss == "cispo":
        return torch.stack([cispo(case, w[t], x.advantages[t], x.logprobs[t]) for t in range(x.length)])
    if case.loss == "sapo":
        return torch.stack([sapo(case, w[t], x.advantages[t]) for t in range(x.length)])
    if case.loss == "gmpo":
        return gmpo(case, x)
    if case.loss == "vespo":
        return vespo(case, x)
    if case.loss in DPPO:
        return dppo(case, x, w)
    if case.loss == "clip_cov":
        return clip_cov(case, x, w)
    if case.loss == "kl_cov":
        return kl_cov(case, x, w)
    return torch.stack([-x.advantages[t] * x.logprobs[t] for t in range(x.length)])  # REINFORCE, Williams 1992


def _token(case: Case, x: Terms, w: list[Tensor], t: int) -> Token:
    advantage = x.advantages[t].item()
    return Token(w[t], x.d[t], x.logprobs[t], advantage, *clip_widths(case), case.delta, case.tau_positive)


def surrogate(case: Case, w: Tensor, advantage: Tensor) -> Tensor:
    """``-min(w A, clip(w, 1 - eps, 1 + eps_high) A)`` (PPO, arXiv 1707.06347, Eq. 7; GSPO, Eq. 5).

    ``delta`` bounds the first of the two from above (two-sided clip, INTELLECT-2, arXiv 2505.07291).
    """
    epsilon, epsilon_high = clip_widths(case)
    low, high = w.new_tensor(1 - epsilon), w.new_tensor(1 + epsilon_high)
    capped = w if case.delta is None or w <= case.delta else w.new_tensor(case.delta)
    clipped = low if w < low else high if w > high else w
    first, second = capped * advantage, clipped * advantage
    return -(first if first <= second else second)


def cispo(case: Case, w: Tensor, advantage: Tensor, logprob: Tensor) -> Tensor:
    """``-sg[min(w, eps_high)] A log pi`` (MiniMax-M1, arXiv 2506.13585, Eq. 4)."""
    return -min(w.item(), clip_widths(case)[1]) * advantage * logprob


def sapo(case: Case, w: Tensor, advantage: Tensor) -> Tensor:
    """``-A sigmoid(tau (w - 1)) 4 / tau`` (SAPO, arXiv 2511.20347); tau by the sign of the advantage."""
    tau = case.tau_positive if advantage > 0 else case.tau_negative
    return -advantage * 4 / tau / (1 + torch.exp(-tau * (w - 1)))


def gmpo(case: Case, x: Terms) -> Tensor:
    """``-A exp(mean_t clip_A(d_t))`` (GMPO, arXiv 2507.20673): above for A > 0, below for the others."""
    epsilon, epsilon_high = clip_widths(case)
    d = x.d
    clipped = []
    for t in range(x.length):
        if x.advantages[t] > 0:
            clipped.append(d[t] if d[t] <= epsilon_high else d.new_tensor(epsilon_high))
        else:
            clipped.append(d[t] if d[t] >= -epsilon else d.new_tensor(-epsilon))
    return -x.advantages * (torch.stack(clipped).sum() / x.length).exp()


def vespo(case: Case, x: Terms) -> Tensor:
    """``-sg[phi(W)] A log pi`` with ``phi(W) = W^k e^(-lambda W) e^lambda`` (VESPO, arXiv 2602.10693).

    ``W`` is the ratio of the policy and the sampler over the whole sequence; of these two factors per token,
    ``pi / pi_old`` and ``pi_old / pi_sampler``, the second is corrected for as the case says.
    """
    whole = math.prod(math.exp(d) for d in x.d.tolist())
    if case.mismatch is not None:
        whole *= math.prod(mismatch_weights(case, x)[0])
    losses = []
    for t in range(x.length):
        above = bool(x.advantages[t] >= 0)
        k, decay = (case.k_positive, case.lambda_positive) if above else (case.k_negative, case.lambda_negative)
        losses.append(-(whole**k) * math.exp(decay - decay * whole) * x.advantages[t] * x.logprobs[t])
    return torch.stack(losses)


def has_left(case: Case, x: Terms, t: int) -> str:
    """Where token t has left the trust region to, ``low`` or ``high``, if its advantage drives it further; else empty.

    DPPO (arXiv 2602.04879): the divergence of two coins, "this token" against "any other".
    """
    epsilon, epsilon_high = clip_widths(case)
    now, before = math.exp(x.logprobs[t].item()), math.exp(x.old[t].item())
    if case.loss == "dppo_tv":
        divergence = (abs(now - before) + abs((1 - now) - (1 - before))) / 2
    else:
        sides = ((before, now), (1 - before, 1 - now))
        divergence = sum(a and (a * math.log(a / b) if b else math.inf) for a, b in sides)
    if x.advantages[t] > 0 and now > before and divergence > epsilon_high:
        return "high"
    return "low" if x.advantages[t] < 0 and now < before and divergence > epsilon else ""


def dppo(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
    """``-M sg[w] A log pi`` (DPPO, arXiv 2602.04879); ``delta`` bounds the weight."""
    losses = []
    for t in range(x.length):
        weight = 0.0 if has_left(case, x, t) else min(w[t].item(), case.delta or math.inf)
        losses.append(-weight * x.advantages[t] * x.logprobs[t])
    return torch.stack(losses)


def clip_cov(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
    """The clipped surrogate, and 0 at chosen tokens (Clip-Cov, arXiv 2505.22617)."""
    assert x.chosen is not None
    losses = [surrogate(case, w[t], x.advantages[t]) for t in range(x.length)]
    return torch.stack([0.0 * loss if on else loss for loss, on in zip(losses, x.chosen, strict=True)])


def kl_cov(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
    """``-w A``, and at chosen tokens ``ppo_kl_coef |log pi_old - log pi|`` more (KL-Cov, arXiv 2505.22617)."""
    assert x.chosen is not None
    weights = [case.ppo_kl_coef if on else 0.0 for on in x.chosen]
    return torch.stack(
        [-w[t] * x.advantages[t] + weights[t] * (x.old[t] - x.logprobs[t]).abs() for t in range(x.length)]
    )


def clipped_tokens(case: Case, x: Terms, w: list[Tensor]) -> tuple[list[bool], list[bool]] | None:
    """Which tokens are clipped (from below, from above), for `clip_frac_*`; None for a loss that clips nothing."""
    epsilon, epsilon_high = clip_widths(case)
    pairs = [(w[t].item(), x.d[t].item(), x.advantages[t].item()) for t in range(x.length)]
    if case.loss in (*SURROGATES, "clip_cov") or (case.loss in OWN and OWN[case.loss].clips):
        cap = float("inf") if case.delta is None else case.delta
        low = [r < 1 - epsilon and a < 0 for r, _, a in pairs]
        return low, [(r > 1 + epsilon_high and a > 0) or (r > cap and a < 0) for r, _, a in pairs]
    if case.loss == "cispo":
        return [False] * x.length, [r > epsilon_high and a != 0 for r, _, a in pairs]
    if case.loss in DPPO:
        left, cap = [has_left(case, x, t) for t in range(x.length)], case.delta or math.inf
        capped = [r > cap and a != 0 for r, _, a in pairs]
        return [side == "low" for side in left], [side == "high" or c for side, c in zip(left, capped, strict=True)]
    if case.loss == "gmpo":
        return [d < -epsilon and a < 0 for _, d, a in pairs], [d > epsilon_high and a > 0 for _, d, a in pairs]
    return None


def off_policy(case: Case, x: Terms) -> list[bool]:
    """DeepSeek-V3.2 (arXiv 2512.02556, Eq. 9): tokens of negative advantage where the policy has left the sequence."""
    assert case.off_policy_threshold is not None
    drift = sum((-x.d).tolist()) / x.length
    return [a < 0 and drift > case.off_policy_threshold for a in x.advantages.tolist()]


def mismatch_weights(case: Case, x: Terms) -> tuple[list[float], list[float], list[bool]]:
    """Correction for a sampler that is not the trainer: (weight of each token, raw weights, which of these acted).

    ``pi_old / pi_sampler`` of the token, of the sequence, or its geometric mean (docs/metrics.md, `mismatch/*`).
    """
    assert case.mismatch is not None
    level, how, high, low = case.mismatch
    difference = x.old - x.sampler
    if level == "token":
        raw = difference.exp().tolist()
    else:
        total = difference.sum()
        raw = [(total if level == "sequence" else total / x.length).exp().item()]
    acted = [r > high or (how == "mask" and r < low) for r in raw]
    kept = [(high if how == "truncate" else 0.0) if a else r for a, r in zip(acted, raw, strict=True)]
    return (kept if level == "token" else kept * x.length), raw, acted


def kl_terms(case: Case, x: Terms) -> Tensor:
    """``(n,)`` k1, k2 or k3 of http://joschu.net/blog/kl-approx.html, each times its token ratio if so set."""
    assert x.reference is not None
    q = x.reference - x.logprobs
    kl = {"k1": -q, "k2": q * q / 2, "k3": q.exp() - 1 - q}[case.kl_estimator]
    return kl * x.d.exp() if case.kl_importance_weighted else kl


def token_weight(case: Case, length: int) -> float:
    """The column "average" of the table in docs/objectives/README.md, inside the sums."""
    return 1 / length if averaged_as(case) in ("grpo", "sapo", "gmpo") else 1.0


def is_free_of_zeros(case: Case) -> bool:
    """Whether a completion of advantage 0 has no gradient."""
    return case.loss not in OWN or OWN[case.loss].free_of_zeros


def averaged_as(case: Case) -> str:
    """The loss itself, or one of the package that averages like a user's."""
    return OWN[case.loss].average if case.loss in OWN else case.loss


def denominator(case: Case, sequences: int, tokens: int, longest: int) -> float:
    """The same column, before the sums: over the minibatch, whatever is left out of the forward."""
    if averaged_as(case) in ("grpo", "sapo", "gmpo", "luspo"):
        return sequences
    return sequences * longest if averaged_as(case) in ("dr_grpo", *DPPO) else tokens
