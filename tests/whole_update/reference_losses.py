"""The loss of every token of one completion, token by token: the equations of docs/objectives and their papers.

``d_t = log pi(y_t) - log pi_old(y_t)`` throughout, ``A_t`` is the advantage, ``n`` the number of trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.whole_update.own_losses import OWN, Token

if TYPE_CHECKING:
    from tests.whole_update.case import Case

DPPO = ("dppo_tv", "dppo_kl")
"""One mask of a token, two divergences."""

SURROGATES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo")
"""One loss of a token, five averages."""

DEFAULT_WIDTHS = {"token": (0.2, 0.27), "sequence": (3e-4, 4e-4), "sequence_token": (3e-4, 4e-4)}
"""(epsilon, epsilon_high); those of sequences are of GSPO, arXiv 2507.18071, section 5.1."""


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
    own = OWN[case.loss].widths if case.loss in OWN else EQUATIONS[case.loss].widths
    low, high = own or DEFAULT_WIDTHS[case.level]
    if case.epsilon is not None:
        low = high = case.epsilon
    return low, high if case.epsilon_high is None else case.epsilon_high


def shares_one_loss(case: Case) -> bool:
    """Whether all tokens of a completion have one loss, with the gradient of all of them."""
    shares = None if case.loss in OWN else EQUATIONS[case.loss].shares_one_loss
    return case.level == "sequence" if shares is None else shares


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
    return EQUATIONS[case.loss].losses(case, x, w)


def _token(case: Case, x: Terms, w: list[Tensor], t: int) -> Token:
    advantage = x.advantages[t].item()
    return Token(w[t], x.d[t], x.logprobs[t], advantage, *clip_widths(case), case.delta, case.tau_positive)


def surrogate(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-min(w A, clip(w, 1 - eps, 1 + eps_high) A)`` (PPO, arXiv 1707.06347, Eq. 7; GSPO, Eq. 5).

    ``delta`` bounds the first of the two from above (two-sided clip, INTELLECT-2, arXiv 2505.07291).
    """
    epsilon, epsilon_high = clip_widths(case)
    ratio, advantage = w[t], x.advantages[t]
    low, high = ratio.new_tensor(1 - epsilon), ratio.new_tensor(1 + epsilon_high)
    capped = ratio if case.delta is None or ratio <= case.delta else ratio.new_tensor(case.delta)
    clipped = low if ratio < low else high if ratio > high else ratio
    first, second = capped * advantage, clipped * advantage
    return -(first if first <= second else second)


def reinforce(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-A log pi`` (Williams 1992)."""
    return -x.advantages[t] * x.logprobs[t]


def cispo(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-sg[min(w, eps_high)] A log pi`` (MiniMax-M1, arXiv 2506.13585, Eq. 4)."""
    return -min(w[t].item(), clip_widths(case)[1]) * x.advantages[t] * x.logprobs[t]


def sapo(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-A sigmoid(tau (w - 1)) 4 / tau`` (SAPO, arXiv 2511.20347); tau by the sign of the advantage."""
    tau = case.tau_positive if x.advantages[t] > 0 else case.tau_negative
    return -x.advantages[t] * 4 / tau / (1 + torch.exp(-tau * (w[t] - 1)))


def gmpo(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
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


def vespo(case: Case, x: Terms, w: list[Tensor]) -> Tensor:
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


def dppo(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-M sg[w] A log pi`` (DPPO, arXiv 2602.04879); ``delta`` bounds the weight."""
    weight = 0.0 if has_left(case, x, t) else min(w[t].item(), case.delta or math.inf)
    return -weight * x.advantages[t] * x.logprobs[t]


def clip_cov(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """The clipped surrogate, and 0 at chosen tokens (Clip-Cov, arXiv 2505.22617)."""
    assert x.chosen is not None
    return (0.0 if x.chosen[t] else 1.0) * surrogate(case, x, w, t)


def kl_cov(case: Case, x: Terms, w: list[Tensor], t: int) -> Tensor:
    """``-w A``, and at chosen tokens ``ppo_kl_coef |log pi_old - log pi|`` more (KL-Cov, arXiv 2505.22617)."""
    assert x.chosen is not None
    return -w[t] * x.advantages[t] + (case.ppo_kl_coef if x.chosen[t] else 0.0) * (x.old[t] - x.logprobs[t]).abs()


def outside(case: Case, x: Terms, w: list[Tensor], t: int) -> str:
    """Where the ratio of token t has left the clip of the surrogates to, or the cap; else empty."""
    epsilon, epsilon_high = clip_widths(case)
    ratio, advantage = w[t].item(), x.advantages[t].item()
    if (ratio > 1 + epsilon_high and advantage > 0) or (ratio > (case.delta or math.inf) and advantage < 0):
        return "high"
    return "low" if ratio < 1 - epsilon and advantage < 0 else ""


def capped(case: Case, x: Terms, w: list[Tensor], t: int) -> str:
    """``high`` where the weight of cispo is capped, else empty."""
    return "high" if w[t].item() > clip_widths(case)[1] and x.advantages[t] != 0 else ""


def outside_of_logs(case: Case, x: Terms, w: list[Tensor], t: int) -> str:
    """Where gmpo clips the log-ratio of token t: ``low``, ``high`` or empty."""
    epsilon, epsilon_high = clip_widths(case)
    d, advantage = x.d[t].item(), x.advantages[t].item()
    return "low" if d < -epsilon and advantage < 0 else "high" if d > epsilon_high and advantage > 0 else ""


def outside_or_capped(case: Case, x: Terms, w: list[Tensor], t: int) -> str:
    """Where token t has left the trust region to; ``high`` too where its weight is capped."""
    is_capped = w[t].item() > (case.delta or math.inf) and x.advantages[t] != 0
    return "high" if is_capped else has_left(case, x, t)


def each(loss: Callable[[Case, Terms, list[Tensor], int], Tensor]) -> Callable[[Case, Terms, list[Tensor]], Tensor]:
    """The loss of every token from that of token t."""
    return lambda case, x, w: torch.stack([loss(case, x, w, t) for t in range(x.length)])


@dataclass(frozen=True)
class Equation:
    """A loss of docs/objectives."""

    losses: Callable[[Case, Terms, list[Tensor]], Tensor]
    """``(n,)`` of the tokens, by the ratios that multiply their advantages."""
    average: str
    """Over the tokens of a minibatch, see `token_weight` and `denominator`."""
    clips: Callable[[Case, Terms, list[Tensor], int], str] | None = None
    """Whether token t is clipped from below (``low``), from above (``high``) or not (empty), for `clip_frac_*`."""
    widths: tuple[float, float] | None = None
    """Default (epsilon, epsilon_high) if they are no matter of the level."""
    shares_one_loss: bool | None = None
    """Whether all tokens of a completion have one loss, with the gradient of all of them; None: at level sequence."""


EQUATIONS = {
    "grpo": Equation(each(surrogate), "sequence_mean", outside),
    "dr_grpo": Equation(each(surrogate), "max_tokens", outside),
    "bnpo": Equation(each(surrogate), "tokens", outside),
    "dapo": Equation(each(surrogate), "tokens", outside),
    "luspo": Equation(each(surrogate), "sequence_sum", outside),
    "cispo": Equation(each(cispo), "tokens", capped, widths=(0.0, 5.0), shares_one_loss=False),
    "sapo": Equation(each(sapo), "sequence_mean"),
    "gmpo": Equation(gmpo, "sequence_mean", outside_of_logs, widths=(0.4, 0.4), shares_one_loss=True),
    "vespo": Equation(vespo, "tokens"),
    "dppo_tv": Equation(each(dppo), "max_tokens", outside_or_capped, widths=(0.15, 0.15)),
    "dppo_kl": Equation(each(dppo), "max_tokens", outside_or_capped, widths=(0.05, 0.05)),
    "clip_cov": Equation(each(clip_cov), "tokens", outside, widths=(1.0, 1.0)),
    "kl_cov": Equation(each(kl_cov), "tokens"),
    "reinforce": Equation(each(reinforce), "tokens", shares_one_loss=False),
}


def clipped_tokens(case: Case, x: Terms, w: list[Tensor]) -> tuple[list[bool], list[bool]] | None:
    """Which tokens are clipped (from below, from above), for `clip_frac_*`; None for a loss that clips nothing."""
    own = outside if case.loss in OWN and OWN[case.loss].clips else None
    clips = own if case.loss in OWN else EQUATIONS[case.loss].clips
    if clips is None:
        return None
    sides = [clips(case, x, w, t) for t in range(x.length)]
    return [side == "low" for side in sides], [side == "high" for side in sides]


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
    return 1 / length if average_of(case) == "sequence_mean" else 1.0


def is_free_of_zeros(case: Case) -> bool:
    """Whether a completion of advantage 0 has no gradient."""
    return case.loss not in OWN or OWN[case.loss].free_of_zeros


def average_of(case: Case) -> str:
    """How the loss is averaged over tokens."""
    return OWN[case.loss].average if case.loss in OWN else EQUATIONS[case.loss].average


def denominator(case: Case, sequences: int, tokens: int, longest: int) -> float:
    """The same column, before the sums: over the minibatch, whatever is left out of the forward."""
    if average_of(case) == "max_tokens":
        return sequences * longest
    return tokens if average_of(case) == "tokens" else sequences
