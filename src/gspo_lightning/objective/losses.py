"""The losses. Each is one function of flat tensors: it returns the loss of every token, before any averaging.

A loss takes a `LossInputs` and returns ``(L,)`` values whose gradient is the loss's; `aggregation.py` weighs and adds
them. To add one, follow CONTRIBUTING.md; or keep it in your own package as a `LossSpec`, and name that by
``loss_type: {_target_: hydra.utils.get_object, path: ...}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from gspo_lightning.errors import UserError
from gspo_lightning.objective.aggregation import AGGREGATIONS
from gspo_lightning.objective.ratios import CLIP_WIDTHS, sequence_mean, sequence_sum


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The settings of single losses, each above 0: an `Objective` has them, and hands them over in `LossInputs`."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    """Temperatures of ``sapo``."""
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    """Exponent and decay of the weight of ``vespo``, by the sign of the advantage."""
    ppo_kl_coef: float = 1.0
    """Weight of the penalty of ``kl_cov``."""


@dataclass(frozen=True)
class LossInputs(LossSettings):
    """What a loss may read; all tensors are ``(L,)``, except ``lengths`` ``(S,)``."""

    logprobs: Tensor
    """With gradient."""
    log_ratio: Tensor
    """``logprobs - old_logprobs``, with gradient."""
    ratio: Tensor
    """Importance ratio of the chosen level, with gradient."""
    advantages: Tensor
    sequence_index: Tensor
    lengths: Tensor
    epsilon: float
    epsilon_high: float
    delta: float | None
    correction: Tensor | None = None
    """Weights of the tokens by a mismatch correction, for a loss whose spec says ``corrects_itself``; None for any
    other, whose value is multiplied by them afterwards, and without a correction."""
    chosen: Tensor | None = None
    """Bool: the tokens that are chosen by their covariance, for a loss whose spec says ``chooses``; None for none."""


LossFunction = Callable[[LossInputs], Tensor]


def clipped_surrogate(x: LossInputs) -> Tensor:
    """``-min(w A, clip(w, 1 - eps, 1 + eps_high) A)`` (PPO, arXiv 1707.06347, Eq. 7; GSPO, Eq. 5).

    With ``delta`` the ratio is first capped from above (two-sided clip, INTELLECT-2, arXiv 2505.07291), which bounds
    the loss of negative advantages.
    """
    ratio = x.ratio if x.delta is None else x.ratio.clamp(max=x.delta)
    clipped = x.ratio.clamp(1 - x.epsilon, 1 + x.epsilon_high)
    return -torch.minimum(ratio * x.advantages, clipped * x.advantages)


def cispo(x: LossInputs) -> Tensor:
    """``-sg[min(w, eps_high)] A log pi`` (MiniMax-M1, arXiv 2506.13585): clips the weight, never drops a token."""
    return -x.ratio.detach().clamp(max=x.epsilon_high) * x.advantages * x.logprobs


def sapo(x: LossInputs) -> Tensor:
    """``-A sigmoid(tau (w - 1)) 4 / tau`` (SAPO, arXiv 2511.20347): a soft gate in place of the clip.

    ``tau`` is ``tau_positive`` for positive advantages and ``tau_negative`` for the others.
    """
    # new_full keeps the dtype: torch.where of two Python floats would round the temperatures to float32.
    tau = torch.where(x.advantages > 0, x.ratio.new_full((), x.tau_positive), x.ratio.new_full((), x.tau_negative))
    return -x.advantages * torch.sigmoid(tau * (x.ratio - 1)) * 4 / tau


def gmpo(x: LossInputs) -> Tensor:
    """``-A exp(mean_t clip_A(d_t))``: geometric mean of clipped token ratios (GMPO, arXiv 2507.20673).

    Log-ratios are clipped by the sign of the advantage (from above for A > 0, from below for A < 0), averaged over
    the sequence and exponentiated; the value is the same for all tokens of a sequence.
    """
    high = x.log_ratio.clamp(max=x.epsilon_high)
    low = x.log_ratio.clamp(min=-x.epsilon)
    clipped = torch.where(x.advantages > 0, high, low)
    return -sequence_mean(clipped, x.sequence_index, x.lengths).exp()[x.sequence_index] * x.advantages


def vespo(x: LossInputs) -> Tensor:
    """``-sg[W^k exp(lambda (1 - W))] A log pi, W = exp(sum_t d_t)`` (VESPO, arXiv 2602.10693): a smooth weight by the
    ratio of the whole sequence, not normalised by its length.

    The weight is 1 at ``W = 1``, largest at ``W = k / lambda``, and falls to 0 on both sides. ``k`` and ``lambda`` are
    ``k_positive`` and ``lambda_positive`` for advantages of 0 or more, ``k_negative`` and ``lambda_negative`` for the
    others. The weights of a mismatch correction are factors of ``W``; a token that it masks makes ``W`` 0, and with it
    the loss of its sequence. (TRL takes 1e-8 for a masked token, and for any smaller ``W``.)
    """
    d = x.log_ratio.detach()
    if x.correction is not None:
        d = d + x.correction.to(d.dtype).log()
    log_w = sequence_sum(d, x.sequence_index, x.lengths)[x.sequence_index]
    positive = x.advantages >= 0
    k = torch.where(positive, d.new_full((), x.k_positive), d.new_full((), x.k_negative))
    lambda_ = torch.where(positive, d.new_full((), x.lambda_positive), d.new_full((), x.lambda_negative))
    # Where W itself is beyond the dtype, its logarithm is not: infinity in the exponent makes the weight 0, as it is.
    return -(k * log_w - lambda_ * log_w.expm1()).exp() * x.advantages * x.logprobs


def clip_cov(x: LossInputs) -> Tensor:
    """``-min(w A, clip(w, 1 - eps, 1 + eps_high) A), 0 for tokens drawn by covariance`` (Clip-Cov, arXiv 2505.22617):
    some of the tokens that take most entropy from the policy have no gradient.

    They are drawn among those whose covariance (`covariance.py`) lies between ``clip_cov_lb`` and ``clip_cov_ub`` and
    that the clip leaves: ``clip_cov_ratio`` of all tokens.
    """
    losses = clipped_surrogate(replace(x, delta=None))
    return losses if x.chosen is None else losses.masked_fill(x.chosen, 0.0)


def kl_cov(x: LossInputs) -> Tensor:
    """``-w A, plus ppo_kl_coef |log w| for tokens of highest covariance`` (KL-Cov, arXiv 2505.22617): the tokens that
    take most entropy from the policy are held where they were, ``kl_cov_ratio`` of all.
    """
    losses = -x.ratio * x.advantages
    return losses if x.chosen is None else losses + x.ppo_kl_coef * x.log_ratio.abs().masked_fill(~x.chosen, 0.0)


def reinforce(x: LossInputs) -> Tensor:
    """``-A log pi`` (Williams 1992): no ratio, no clip; meant for one optimizer step per rollout."""
    return -x.advantages * x.logprobs


def dppo_tv(x: LossInputs) -> Tensor:
    """``-sg[w] A log pi, 0 where A (p - p_old) > 0 and |p - p_old| > eps`` (DPPO, arXiv 2602.04879): a trust region of
    probabilities, not of their ratio.

    A token is left out once its probability has moved further than ``eps_high`` upwards (A > 0) or ``eps`` downwards
    (A < 0): the total variation between two distributions over "this token" and "any other". ``delta`` caps ``w``.
    """
    return _within(x, _left_by_tv(x))


def dppo_kl(x: LossInputs) -> Tensor:
    """``-sg[w] A log pi, 0 where A (p - p_old) > 0 and KL(p_old, p) > eps`` (DPPO, arXiv 2602.04879): as
    `dppo_tv`, by ``p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))`` of those two distributions.
    """
    return _within(x, _left_by_kl(x))


def _within(x: LossInputs, left: tuple[Tensor, Tensor]) -> Tensor:
    weight = x.ratio.detach() if x.delta is None else x.ratio.detach().clamp(max=x.delta)
    return -weight.masked_fill(left[0] | left[1], 0.0) * x.advantages * x.logprobs


def _left_by_tv(x: LossInputs) -> tuple[Tensor, Tensor]:
    """Tokens that have left the trust region (downwards, upwards) in the direction of their advantage."""
    new, old = _logprobs(x)
    rise = new.exp() - old.exp()
    return (-rise > x.epsilon) & (x.advantages < 0), (rise > x.epsilon_high) & (x.advantages > 0)


def _left_by_kl(x: LossInputs) -> tuple[Tensor, Tensor]:
    new, old = _logprobs(x)
    others = -torch.expm1(old)
    # Where the token was certain, "any other" adds nothing, however likely it has become.
    of_others = torch.where(others > 0, others * (_log1mexp(old) - _log1mexp(new)), 0.0)
    divergence = old.exp() * (old - new) + of_others
    low = (divergence > x.epsilon) & (new < old) & (x.advantages < 0)
    return low, (divergence > x.epsilon_high) & (new > old) & (x.advantages > 0)


def _logprobs(x: LossInputs) -> tuple[Tensor, Tensor]:
    """New and old log-probabilities; at most 0, which rounding may exceed."""
    new = x.logprobs.detach()
    return new.clamp(max=0.0), (new - x.log_ratio.detach()).clamp(max=0.0)


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of ``x <= 0``, without cancellation near 0."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


@dataclass(frozen=True)
class Clip:
    """Where a loss clips, for metrics and messages; the loss itself does not read it."""

    masks: Callable[[LossInputs], tuple[Tensor, Tensor]]
    """(clipped from below, clipped from above), each ``(L,)`` bool: tokens whose loss would change with the widths."""
    bounds: Callable[[float, float], tuple[float, float]] | None
    """(epsilon, epsilon_high) -> smallest and largest ratio that is never clipped; None if it clips by something else
    than the ratio, that is 0 where the policy has not moved."""


def _surrogate_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    high = (x.ratio > 1 + x.epsilon_high) & (x.advantages > 0)
    if x.delta is not None:
        high = high | ((x.ratio > x.delta) & (x.advantages < 0))
    return (x.ratio < 1 - x.epsilon) & (x.advantages < 0), high


def _cispo_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    high = (x.ratio > x.epsilon_high) & (x.advantages != 0)
    return torch.zeros_like(high), high


def _gmpo_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    low = (x.log_ratio < -x.epsilon) & (x.advantages < 0)
    return low, (x.log_ratio > x.epsilon_high) & (x.advantages > 0)


def _clip_cov_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    return _surrogate_masks(replace(x, delta=None))


def _tv_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    return _with_capped(x, *_left_by_tv(x))


def _kl_masks(x: LossInputs) -> tuple[Tensor, Tensor]:
    return _with_capped(x, *_left_by_kl(x))


def _with_capped(x: LossInputs, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low, high if x.delta is None else high | ((x.ratio > x.delta) & (x.advantages != 0))


SURROGATE_CLIP = Clip(_surrogate_masks, lambda low, high: (1 - low, 1 + high))
CLIP_COV_CLIP = Clip(_clip_cov_masks, SURROGATE_CLIP.bounds)
CISPO_CLIP = Clip(_cispo_masks, lambda low, high: (0.0, high))
GMPO_CLIP = Clip(_gmpo_masks, lambda low, high: (math.exp(-low), math.exp(high)))
TV_CLIP, KL_CLIP = Clip(_tv_masks, None), Clip(_kl_masks, None)

CLIP_KEYS = ("epsilon", "epsilon_high", "delta")
SETTINGS = tuple(setting.name for setting in fields(LossSettings))
LOSS_KEYS = (*CLIP_KEYS, *SETTINGS)
"""The settings that some losses read and others do not."""

CHOICE_KEYS = {"draw": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), "top": ("kl_cov_ratio",)}
"""The settings by which tokens are chosen for a loss, see `LossSpec.chooses`."""


@dataclass(frozen=True)
class LossSpec:
    """A loss, how its tokens are averaged, and what it uses. Raises UserError for a name that does not exist."""

    function: LossFunction
    aggregation: str
    """Over tokens: ``sequence_mean``, ``sequence_sum``, ``tokens`` or ``max_tokens`` (`aggregation.AGGREGATIONS`)."""
    clip: Clip | None
    """Where it clips; None if nowhere or unknown: there are no ``clip_frac_*`` metrics then."""
    reads: tuple[str, ...] = CLIP_KEYS
    """Which of ``epsilon``, ``epsilon_high``, ``delta`` and the keyword arguments of `LossInputs` (`LossSettings`) it
    reads; the others are refused."""
    levels: tuple[str, ...] = ("token", "sequence", "sequence_token")
    """Ratio levels it is defined for; empty if it uses no ratio."""
    epsilons: tuple[float, float] | None = None
    """Own default clip widths; None takes those of the level."""
    shares_one_loss: bool | None = None
    """True if at every level all tokens of a completion get the same loss, whose gradient is that of all of them; False
    if never, for example with a detached ratio. None: True at level ``sequence``, where tokens share their ratio."""
    corrects_itself: bool = False
    """True if it reads ``LossInputs.correction``, so that its value is not multiplied by a mismatch correction, of
    which only those of tokens are accepted then."""
    chooses: Literal["draw", "top"] | None = None
    """How tokens of a whole minibatch are chosen by their covariance for ``LossInputs.chosen``: ``draw``, at random
    between two bounds, or the ``top`` share. It reads `CHOICE_KEYS`, and takes one forward more for each step."""

    def __post_init__(self) -> None:
        for field, names, known in (
            ("aggregation", (self.aggregation,), tuple(AGGREGATIONS)),
            ("reads", self.reads, LOSS_KEYS),
            ("levels", self.levels, tuple(CLIP_WIDTHS)),
            ("chooses", (self.chooses,) if self.chooses else (), tuple(CHOICE_KEYS)),
        ):
            for name in names:
                if name not in known:
                    raise UserError(f"LossSpec.{field}: there is no {name!r}; choose from {', '.join(known)}")

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that have an effect: those it reads, and those by which its tokens are chosen."""
        return (*self.reads, *(CHOICE_KEYS[self.chooses] if self.chooses else ()))

    @property
    def name(self) -> str:
        """The name of its function."""
        return getattr(self.function, "__name__", type(self.function).__name__)


LOSSES: dict[str, LossSpec] = {
    "grpo": LossSpec(clipped_surrogate, "sequence_mean", SURROGATE_CLIP),
    "dr_grpo": LossSpec(clipped_surrogate, "max_tokens", SURROGATE_CLIP),
    "bnpo": LossSpec(clipped_surrogate, "tokens", SURROGATE_CLIP),
    "dapo": LossSpec(clipped_surrogate, "tokens", SURROGATE_CLIP),
    "luspo": LossSpec(clipped_surrogate, "sequence_sum", SURROGATE_CLIP),
    "cispo": LossSpec(cispo, "tokens", CISPO_CLIP, ("epsilon_high",), levels=("token",), epsilons=(0.0, 5.0)),
    "sapo": LossSpec(sapo, "sequence_mean", None, ("tau_positive", "tau_negative"), levels=("token", "sequence")),
    "gmpo": LossSpec(
        gmpo,
        "sequence_mean",
        GMPO_CLIP,
        ("epsilon", "epsilon_high"),
        levels=("token",),
        epsilons=(0.4, 0.4),
        shares_one_loss=True,
    ),
    "vespo": LossSpec(
        vespo,
        "tokens",
        None,
        ("k_positive", "lambda_positive", "k_negative", "lambda_negative"),
        levels=("token",),
        shares_one_loss=False,
        corrects_itself=True,
    ),
    "dppo_tv": LossSpec(
        dppo_tv, "max_tokens", TV_CLIP, levels=("token",), epsilons=(0.15, 0.15), shares_one_loss=False
    ),
    "dppo_kl": LossSpec(
        dppo_kl, "max_tokens", KL_CLIP, levels=("token",), epsilons=(0.05, 0.05), shares_one_loss=False
    ),
    "clip_cov": LossSpec(
        clip_cov,
        "tokens",
        CLIP_COV_CLIP,
        ("epsilon", "epsilon_high"),
        levels=("token",),
        epsilons=(1.0, 1.0),
        chooses="draw",
    ),
    "kl_cov": LossSpec(kl_cov, "tokens", None, ("ppo_kl_coef",), levels=("token",), chooses="top"),
    "reinforce": LossSpec(reinforce, "tokens", None, (), levels=()),
}
"""The registry behind ``objective.loss_type``."""
