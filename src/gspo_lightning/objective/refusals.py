"""Settings of the objective that contradict each other or cannot have an effect, found before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from gspo_lightning.errors import UserError
from gspo_lightning.objective.loss_refusals import Finding, not_above_zero, of_loss
from gspo_lightning.objective.objective import Objective


def check_objective(
    objective: Objective,
    *,
    num_iterations: int,
    num_minibatches: int,
    ref_sync_every_n_rollouts: int = 0,
    ref_model_mixup_alpha: float = 0.6,
    has_adapter: bool = False,
    staleness: int = 0,
    keep_zero_advantage: bool = False,
    old_logprobs: str = "policy",
    max_completion_length: int | None = None,
) -> list[Finding]:
    """All findings, in a fixed order. Each names the key and the fix.

    ``staleness`` is the number of rollouts by which the sampling weights lag behind: above 0 no ratio is exactly 1.
    Nor is one with ``old_logprobs`` of the sampler. ``max_completion_length`` is that of the rollouts; None if unknown.
    """
    steps = num_iterations * num_minibatches
    on_policy = steps == 1 and not staleness and old_logprobs == "policy"
    return [
        *of_loss(objective, steps, staleness, max_completion_length, on_policy=on_policy),
        *(_sampler_as_old(objective, staleness) if old_logprobs == "sampler" else ()),
        *_reference(objective),
        *_reference_sync(objective, ref_sync_every_n_rollouts, ref_model_mixup_alpha, has_adapter),
        *_selection(objective, on_policy, keep_zero_advantage),
        *_entropy(objective),
        *_tokens(objective),
    ]


def _reference(objective: Objective) -> Iterator[Finding]:
    for key in ("beta", "beta_end"):
        if (getattr(objective, key) or 0) < 0:
            yield Finding(
                "contradiction",
                f"objective.{key}={getattr(objective, key)} would reward divergence; it must be 0 or more",
            )
    if objective.beta_end == objective.beta:
        yield Finding("no_effect", f"objective.beta_end={objective.beta_end} equals objective.beta; set it to null")
    if not objective.needs_ref:
        for key, default in (("kl_importance_weighted", False), ("kl_estimator", "k3")):
            if getattr(objective, key) != default:
                yield Finding(
                    "no_effect",
                    f"objective.{key} has no effect with objective.beta=0; set objective.beta or leave it "
                    f"at {str(default).lower()}",
                )
    elif objective.kl_estimator == "k1" and not objective.kl_importance_weighted:
        yield Finding(
            "contradiction",
            "objective.kl_estimator=k1 is not a penalty without objective.kl_importance_weighted: its gradient does "
            "not contain the reference; set kl_importance_weighted to true, or use k3",
        )
    elif objective.kl_estimator == "k2" and objective.kl_importance_weighted:
        yield Finding(
            "warning",
            "objective.kl_importance_weighted with kl_estimator=k2 does not have the gradient of a KL divergence; set "
            "it to false, or use k3",
        )


def _reference_sync(objective: Objective, every: int, alpha: float, has_adapter: bool) -> Iterator[Finding]:
    if not every:
        if alpha != 0.6:
            yield Finding(
                "no_effect", "update.ref_model_mixup_alpha has no effect with update.ref_sync_every_n_rollouts=0"
            )
        return
    if not objective.needs_ref:
        yield Finding("no_effect", "update.ref_sync_every_n_rollouts has no effect with objective.beta=0")
    if has_adapter:
        yield Finding(
            "contradiction",
            "update.ref_sync_every_n_rollouts: the reference of a LoRA run is the model without its adapter and cannot "
            "move; set it to 0 or train all weights (lora=none)",
        )
    if not 0 < alpha <= 1:
        yield Finding("contradiction", f"update.ref_model_mixup_alpha={alpha} must be above 0 and at most 1")


def _sampler_as_old(objective: Objective, staleness: int) -> Iterator[Finding]:
    if staleness and objective.importance_sampling_level != "token" and objective.spec.levels:
        yield Finding(
            "warning",
            f"update.old_logprobs=sampler with rollout.engine.staleness={staleness}: nothing measures how far rounding "
            "moves the ratio of a sequence (gspo/ratio_noise_floor), which the clip must exceed; use a ratio per "
            "token, or update.old_logprobs=policy",
        )
    if objective.mismatch is not None:
        yield Finding(
            "contradiction",
            "update.old_logprobs=sampler contradicts objective.mismatch: the ratio is one to the sampler already, and "
            "the correction would be 1; set mismatch=none, or update.old_logprobs=policy",
        )
    weighted = objective.needs_ref and objective.kl_importance_weighted
    if not objective.spec.levels and objective.off_policy_mask_threshold is None and not weighted:
        yield Finding(
            "no_effect",
            f"update.old_logprobs=sampler has no effect on loss_type={objective.loss_name}, which has no importance "
            "ratio; set it to policy",
        )


def _selection(objective: Objective, on_policy: bool, keep_zero_advantage: bool) -> Iterator[Finding]:
    if not 0 < objective.top_entropy_quantile <= 1:
        yield Finding(
            "contradiction",
            f"objective.top_entropy_quantile={objective.top_entropy_quantile} must be above 0 and at most 1",
        )
    threshold = objective.off_policy_mask_threshold
    if threshold is not None:
        yield from not_above_zero(objective, ("off_policy_mask_threshold",))
    if threshold is not None and on_policy:
        yield Finding(
            "no_effect",
            "objective.off_policy_mask_threshold cannot act: with one optimizer step per rollout the policy is the "
            "sampler; raise update.num_minibatches or update.num_iterations, or set it to null",
        )
    if keep_zero_advantage and not objective.zero_advantage_is_free:
        what = (
            "a KL term or an entropy bonus (objective.beta, objective.entropy_coef, objective.entropy_target)"
            if objective.needs_ref or objective.needs_entropy
            else f"loss_type={objective.loss_name}, which has a gradient where the advantage is 0"
        )
        yield Finding(
            "no_effect",
            f"update.keep_zero_advantage=true has no effect with {what}: every completion is forwarded then; set it to "
            "false",
        )


def _entropy(objective: Objective) -> Iterator[Finding]:
    low, high = objective.entropy_coef_min, objective.entropy_coef_max
    if objective.entropy_target is None:
        for key in ("entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"):
            default = getattr(Objective, key)
            if getattr(objective, key) != default:
                yield Finding(
                    "no_effect",
                    f"objective.{key} has no effect with objective.entropy_target=null; set a target, or leave it at "
                    f"{default}",
                )
        return
    yield from not_above_zero(objective, ("entropy_target", "entropy_coef_delta"))
    if not 0 <= low < high:
        yield Finding(
            "contradiction",
            f"objective.entropy_coef_min={low} must be at least 0 and below objective.entropy_coef_max={high}",
        )
    elif not low <= objective.entropy_coef <= high:
        yield Finding(
            "contradiction",
            f"objective.entropy_coef={objective.entropy_coef} must lie between objective.entropy_coef_min={low} and "
            f"entropy_coef_max={high}",
        )


def warn_or_refuse(finding: Finding) -> None:
    """Refuses a contradiction, and warns of the rest: once, although a command and its module both ask.

    Raises:
        UserError: a contradiction.
    """
    if finding.kind == "contradiction":
        raise UserError(finding.message)
    warnings.warn(finding.message, stacklevel=1)  # Python tells equal warnings of one line apart from others


def refuse_turn_rewards(objective: Objective) -> None:
    """Refuses advantages of single turns if the tokens of a completion share one loss.

    Raises:
        UserError: they do.
    """
    if objective.shares_one_loss:
        where, other = _sharing(objective)
        raise UserError(
            f"the environment rewards turns, but with objective.{where} the tokens of a completion share one loss; use "
            f"{other}"
        )


def _sharing(objective: Objective) -> tuple[str, str]:
    """The setting by which the tokens of a completion share one loss, and one by which they do not."""
    if objective.spec.shares_one_loss:
        return f"loss_type={objective.loss_name}", "another loss_type"
    level = "sequence_token" if "sequence_token" in objective.spec.levels else "token"
    return "importance_sampling_level=sequence", f"importance_sampling_level={level}"


def _tokens(objective: Objective) -> Iterator[Finding]:
    """Findings on settings that weigh or leave out single tokens, if those of a completion share one loss."""
    if not objective.shares_one_loss:
        return
    shared = "{}, where the tokens of a completion share one loss; use {}".format(*_sharing(objective))
    correction = objective.mismatch
    if objective.top_entropy_quantile < 1:
        yield Finding(
            "contradiction",
            f"objective.top_entropy_quantile={objective.top_entropy_quantile} leaves no token out with {shared}",
        )
    if correction is not None and correction.level == "token" and correction.how == "mask":
        yield Finding(
            "contradiction",
            f"objective.mismatch.how=mask at level=token leaves no token out with {shared}, or mismatch=sequence_mask",
        )
    elif correction is not None and correction.level == "token":
        yield Finding(
            "warning",
            f"objective.mismatch.level=token weighs each completion by the mean of its weights with {shared}, or "
            "mismatch=sequence_truncate",
        )
