"""The objective: ratio, loss, KL and entropy terms put together, as a sum over one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from gspo_lightning.errors import UserError, check_choice
from gspo_lightning.objective.aggregation import AGGREGATIONS, Aggregation
from gspo_lightning.objective.kl import Estimator, kl_estimate
from gspo_lightning.objective.losses import (
    LOSS_KEYS,
    LOSSES,
    SETTINGS,
    LossFunction,
    LossInputs,
    LossSettings,
    LossSpec,
)
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.objective.probe import vanishes_without_advantage
from gspo_lightning.objective.ratios import CLIP_WIDTHS, Level, importance_ratio, sequence_mean
from gspo_lightning.objective.selection import near_old_policy
from gspo_lightning.types import Metrics, PolicyLoss


@dataclass(frozen=True)
class Objective(LossSettings):
    """``sum_t weight_t (loss_t + beta KL_t - entropy_coef H_t)`` over the tokens of a micro-batch.

    Divide by ``denominator`` of the whole minibatch to get the loss. Raises UserError for an unknown loss.
    """

    max_completion_length: int
    """The constant in the denominator of ``dr_grpo``."""
    importance_sampling_level: Level = "sequence"
    loss_type: str | LossSpec | LossFunction = "grpo"
    """A name in `losses.LOSSES`, a `LossSpec`, or a function of `LossInputs`. The losses of a function are averaged as
    ``sequence_mean``; it has the clip widths of the level and may read every setting."""
    epsilon: float | None = None
    """Lower clip width; None takes the default of the ratio level."""
    epsilon_high: float | None = None
    """Upper clip width; None takes the default of the loss or of the level, or ``epsilon`` if only that is given."""
    delta: float | None = None
    """Upper cap of the ratio (two-sided clip); None for no cap."""
    beta: float = 0.0
    """Weight of the KL term against the reference; 0 needs no reference."""
    beta_end: float | None = None
    """Weight of the KL term in the last rollout, approached linearly from ``beta``; None keeps ``beta``."""
    kl_estimator: Estimator = "k3"
    kl_importance_weighted: bool = False
    """Weigh each KL term by its token ratio. With ``k1`` and ``k3`` the gradient is then that of ``KL(pi || pi_ref)``,
    even when the policy has moved away from the sampler; with ``k2`` it is not."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; with ``entropy_target`` that of its beginning."""
    entropy_target: float | None = None
    """Entropy in nats per token up to which the bonus acts, with a weight that rises there and falls above it
    (`entropy_control.EntropyControl`); None keeps the weight."""
    entropy_coef_delta: float = 0.005
    """By how much that weight changes with an optimizer step, between ``entropy_coef_min`` and ``entropy_coef_max``."""
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    mask_truncated_completions: bool = False
    """Leave completions cut at the length limit out of loss and denominator."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens with a gradient that the policy term is computed on, highest entropy first; not with
    `shares_one_loss`."""
    off_policy_mask_threshold: float | None = None
    """Leave out tokens of negative advantage in sequences that the policy has moved away from by more than this, in
    nats per token; None leaves out none."""
    mismatch: MismatchCorrection | None = None
    """Weights that correct for a sampler that differs from the trainer; None for no correction."""
    clip_cov_ratio: float = 2e-4
    """Share of the tokens with an advantage that ``clip_cov`` leaves without a gradient."""
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    """Bounds of the covariance of the tokens that it draws these from."""
    kl_cov_ratio: float = 2e-3
    """Share of the tokens with an advantage, highest covariance first, that ``kl_cov`` penalises."""

    def __post_init__(self) -> None:
        check_choice("objective.importance_sampling_level", self.importance_sampling_level, tuple(CLIP_WIDTHS))
        check_choice("objective.kl_estimator", self.kl_estimator, get_args(Estimator))
        if isinstance(self.loss_type, str) and self.loss_type not in LOSSES:
            raise UserError(f"objective.loss_type={self.loss_type}: there is no such loss; choose {', '.join(LOSSES)}")
        if not isinstance(self.loss_type, str | LossSpec) and not callable(self.loss_type):
            raise UserError(
                f"objective.loss_type is of type {type(self.loss_type).__name__}; set it to the name of a loss, a "
                "LossSpec or a function"
            )

    @property
    def spec(self) -> LossSpec:
        """The loss, its aggregation and its defaults."""
        if isinstance(self.loss_type, LossSpec):
            return self.loss_type
        if isinstance(self.loss_type, str):
            return LOSSES[self.loss_type]
        return LossSpec(self.loss_type, "sequence_mean", None, LOSS_KEYS, shares_one_loss=False)

    @property
    def loss_name(self) -> str:
        """Name of the loss in messages: that in `losses.LOSSES`, or that of its function."""
        return self.loss_type if isinstance(self.loss_type, str) else self.spec.name

    @property
    def aggregation(self) -> Aggregation:
        """How tokens are averaged."""
        return AGGREGATIONS[self.spec.aggregation]

    @property
    def clip(self) -> tuple[float, float]:
        """(epsilon, epsilon_high) in effect."""
        low, high = self.spec.epsilons or CLIP_WIDTHS[self.importance_sampling_level]
        if self.epsilon is not None and "epsilon" in self.spec.reads:
            low = high = self.epsilon
        return low, high if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_bounds(self) -> tuple[float, float] | None:
        """Smallest and largest ratio that is never clipped; None if there is no clip, or not one of the ratio, or it is
        unknown."""
        bounds = None if self.spec.clip is None else self.spec.clip.bounds
        return None if bounds is None else bounds(*self.clip)

    @property
    def shares_one_loss(self) -> bool:
        """Whether the tokens of a completion share one loss, whose gradient is that of all of them: weights per token
        then scale the whole completion by their mean, and a mask leaves no token out."""
        if self.spec.shares_one_loss is not None:
            return self.spec.shares_one_loss
        return self.importance_sampling_level == "sequence" and "sequence" in self.spec.levels

    @property
    def needs_ref(self) -> bool:
        """Whether log-probabilities of the reference are needed, now or later in the run."""
        return self.beta != 0.0 or bool(self.beta_end)

    @property
    def needs_entropy(self) -> bool:
        """Whether entropies are needed."""
        return self.entropy_coef != 0.0 or self.entropy_target is not None

    @property
    def selects_tokens(self) -> bool:
        """Whether the entropies under the sampling weights are needed, to choose tokens by them."""
        return self.top_entropy_quantile < 1.0

    def at(self, progress: float) -> Objective:
        """The objective at a point of the run, from 0 (first rollout) to 1 (last), with the ``beta`` of that point."""
        if self.beta_end is None:
            return self
        return replace(self, beta=self.beta + progress * (self.beta_end - self.beta), beta_end=None)

    @property
    def zero_advantage_is_free(self) -> bool:
        """Whether a completion with advantage 0 adds nothing to the gradient, so that it need not be forwarded."""
        return not self.needs_ref and not self.needs_entropy and vanishes_without_advantage(self)

    def denominator(self, num_sequences: int, num_tokens: int) -> float:
        """Divisor of the sum over the minibatch, from counts over all ranks; 1 if they are 0."""
        return self.aggregation.denominator(num_sequences, num_tokens, self.max_completion_length) or 1.0

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        sequence_index: Tensor,
        lengths: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        selected: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> PolicyLoss:
        """Loss sum and metrics of one micro-batch of S whole sequences with L tokens.

        Args:
            logprobs: ``(L,)`` of the policy, with gradient.
            old_logprobs: ``(L,)`` of the weights that sampled.
            advantages: ``(L,)``.
            sequence_index: ``(L,)`` in [0, S).
            lengths: ``(S,)`` tokens per sequence.
            ref_logprobs: ``(L,)``; required if ``needs_ref``.
            entropy: ``(L,)`` with gradient; required if ``needs_entropy``.
            selected: ``(L,)`` bool, the tokens that the policy term is computed on; required if ``selects_tokens``.
            sampler_logprobs: ``(L,)``; required with ``mismatch``.
            chosen: ``(L,)`` bool, the tokens that are chosen by their covariance; required if the loss's spec says so.

        Raises:
            UserError: one of these is not given but required, or the loss function did not return a loss per token, or
                lost the gradient.
        """
        self._check_given(
            ref_logprobs=ref_logprobs, entropy=entropy, selected=selected, sampler_logprobs=sampler_logprobs,
            chosen=chosen,
        )  # fmt: skip
        log_ratio = logprobs - old_logprobs
        correction: Tensor | None = None
        of_correction: Metrics = {}
        if self.mismatch is not None:
            assert sampler_logprobs is not None
            correction, of_correction = self.mismatch(old_logprobs, sampler_logprobs, sequence_index, lengths)
        inputs = self.inputs(logprobs, log_ratio, advantages, sequence_index, lengths, correction, chosen)
        policy = self._loss_of_tokens(inputs)
        metrics = self._metrics(inputs)
        if selected is not None:
            policy = policy * selected
            metrics["selected_frac"] = _mean(selected)
        if inputs.chosen is not None:
            metrics["covariance_frac"] = _mean(inputs.chosen)
        if self.off_policy_mask_threshold is not None:
            kept = near_old_policy(log_ratio, advantages, sequence_index, lengths, self.off_policy_mask_threshold)
            policy = policy * kept
            masked = (~kept).to(log_ratio.dtype)
            metrics["off_policy_masked_frac"] = _mean(sequence_mean(masked, sequence_index, lengths))
        if correction is not None and not self.spec.corrects_itself:
            policy = policy * correction
        metrics |= of_correction
        per_token = policy
        if self.needs_ref:
            assert ref_logprobs is not None
            kl = kl_estimate(logprobs, ref_logprobs, self.kl_estimator)
            per_token = per_token + self.beta * (kl * log_ratio.exp() if self.kl_importance_weighted else kl)
            metrics["kl/ref"] = _mean(kl_estimate(logprobs, ref_logprobs, "k3"))
        if entropy is not None:
            per_token = per_token - self.entropy_coef * entropy
            metrics["entropy"] = _mean(entropy)
        weights = self.aggregation.token_weight(lengths.to(logprobs.dtype)[sequence_index])
        metrics["loss/policy"] = _mean(policy)
        ratios = self._per_unit(inputs.ratio.detach(), inputs)
        return PolicyLoss((weights * per_token).sum(), metrics, ratios)

    def inputs(
        self,
        logprobs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        sequence_index: Tensor,
        lengths: Tensor,
        correction: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> LossInputs:
        """What the loss function reads, from tensors as in `__call__` and the ``(L,)`` weights of `mismatch`."""
        ratio = importance_ratio(log_ratio, sequence_index, lengths, self.importance_sampling_level)
        return LossInputs(
            logprobs, log_ratio, ratio, advantages, sequence_index, lengths, *self.clip, self.delta,
            correction if self.spec.corrects_itself else None,
            chosen if self.spec.chooses else None,
            **{key: getattr(self, key) for key in SETTINGS},
        )  # fmt: skip

    def _check_given(self, **given: Tensor | None) -> None:
        """Refuses a program's own call without what a setting needs: its term would be missing without a word."""
        for setting, needed, name in (
            ("beta", self.needs_ref, "ref_logprobs"),
            ("entropy_coef", self.needs_entropy, "entropy"),
            ("top_entropy_quantile", self.selects_tokens, "selected"),
            ("mismatch", self.mismatch is not None, "sampler_logprobs"),
            ("loss_type", self.spec.chooses is not None, "chosen"),
        ):
            if needed and given[name] is None:
                raise UserError(f"objective.{setting}: the objective was called without {name}; give it")

    def _loss_of_tokens(self, x: LossInputs) -> Tensor:
        """``(L,)`` values of the loss function; a scalar would be broadcast to all tokens and change the gradient."""
        losses: Any = self.spec.function(x)
        if not isinstance(losses, Tensor) or losses.shape != x.logprobs.shape:
            what = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"objective.loss_type: {self.loss_name} returned {what} for tokens of shape "
                f"{tuple(x.logprobs.shape)}; return the loss of every token, without a mean or sum"
            )
        if x.log_ratio.requires_grad and not losses.requires_grad:
            raise UserError(
                f"objective.loss_type: {self.loss_name} returned losses without a gradient; compute them from "
                "logprobs, log_ratio or ratio, without detach, item or numpy"
            )
        return losses

    def _per_unit(self, values: Tensor, x: LossInputs) -> Tensor:
        """Values per token at token level, per sequence at the sequence levels."""
        if self.importance_sampling_level == "token":
            return values
        return sequence_mean(values.to(x.ratio.dtype), x.sequence_index, x.lengths)

    def _metrics(self, x: LossInputs) -> Metrics:
        """Ratios and clipping, per token or per sequence."""
        ratio = self._per_unit(x.ratio.detach(), x)
        metrics = {
            "ratio/mean": _mean(ratio),
            # Not the logarithm of the ratio, which may have been too small for its dtype.
            "log_ratio/abs_mean": _mean(self._per_unit(x.log_ratio.detach(), x).abs()),
            "kl/old": _mean(-x.log_ratio),
        }
        if self.spec.clip is not None:
            for side, mask in zip(("low", "high"), self.spec.clip.masks(x), strict=True):
                metrics[f"clip_frac_{side}"] = _mean(self._per_unit(mask, x))
        return metrics


def _mean(values: Tensor) -> tuple[Tensor, Any]:
    values = values.detach()
    return values.double().sum(), torch.tensor(float(values.numel()), dtype=torch.float64)
