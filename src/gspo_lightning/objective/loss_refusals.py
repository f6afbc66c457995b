"""Settings of the loss, its ratio and its clip that contradict each other or cannot have an effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from gspo_lightning.objective.losses import CHOICE_KEYS, CLIP_KEYS, LOSS_KEYS, SETTINGS, kl_cov
from gspo_lightning.objective.objective import Objective
from gspo_lightning.objective.probe import acts_on_policy

WIDE_SEQUENCE_CLIP = 0.1
"""A sequence's mean log-ratio moves by hundredths in one rollout; a wider clip at sequence level hardly ever acts."""

NARROW_TOKEN_CLIP = 0.05
"""The ratio of a single token moves by tenths in one rollout; a narrower clip at token level acts on most of them."""

NARROW_REGION = 0.05
"""Of the usual width of a trust region: narrower ones are widths of another loss."""


@dataclass(frozen=True)
class Finding:
    """One line for the user; ``contradiction`` refuses, ``no_effect`` refuses unless allowed, ``warning`` warns."""

    kind: Literal["contradiction", "no_effect", "warning"]
    message: str


def not_above_zero(objective: Objective, keys: Iterable[str]) -> Iterator[Finding]:
    """A contradiction for each of the settings that is not above 0."""
    for key in keys:
        if not getattr(objective, key) > 0:
            yield Finding("contradiction", f"objective.{key}={getattr(objective, key)} must be above 0")


def of_loss(
    objective: Objective, steps: int, staleness: int, longest: int | None, *, on_policy: bool
) -> Iterator[Finding]:
    """Findings in a fixed order; arguments as in `refusals.check_objective`, ``steps`` per rollout; ``on_policy`` if
    every ratio is exactly 1."""
    yield from _unread(objective)
    yield from _clip(objective, on_policy)
    yield from _settings(objective, on_policy)
    yield from _choice(objective, on_policy)
    yield from _widths(objective)
    yield from _loss(objective, steps, staleness)
    yield from _longest(objective, longest)


def _unread(objective: Objective) -> Iterator[Finding]:
    reads = objective.spec.settings
    which = f", which reads {' and '.join(f'objective.{name}' for name in reads)}" if reads else ""
    for key in (*LOSS_KEYS, *(key for keys in CHOICE_KEYS.values() for key in keys)):
        default = getattr(Objective, key)
        if key not in reads and getattr(objective, key) != default:
            yield Finding(
                "no_effect",
                f"objective.{key} has no effect on loss_type={objective.loss_name}{which}; set it to "
                f"{'null' if default is None else default}",
            )


def _clip(objective: Objective, on_policy: bool) -> Iterator[Finding]:
    acting = [key for key in CLIP_KEYS if key in objective.spec.reads and getattr(objective, key) is not None]
    low, high = objective.ratio_bounds or (1.0, 1.0)
    if on_policy and acting and objective.spec.clip is not None and low <= 1 <= high:
        yield Finding(
            "no_effect",
            f"objective.{acting[0]} cannot act: with one optimizer step per rollout the ratio is exactly 1; raise "
            "update.num_minibatches or update.num_iterations, or set it to null",
        )


def _settings(objective: Objective, on_policy: bool) -> Iterator[Finding]:
    """Settings of a single loss: each is above 0, and some cannot act at a ratio of 1, as those of a smooth weight that
    is 1 there. What a function alone reads is not known, and of chosen tokens `_choice` knows more."""
    own = [key for key in SETTINGS if key in objective.spec.reads]
    yield from not_above_zero(objective, own)
    ratio_moves = not on_policy or (objective.spec.corrects_itself and objective.mismatch is not None)
    if ratio_moves or objective.spec.chooses or not isinstance(objective.loss_type, str):
        return
    for key in own:
        default = getattr(Objective, key)
        if getattr(objective, key) != default and not acts_on_policy(objective, key):
            yield Finding(
                "no_effect",
                f"objective.{key} cannot act: with one optimizer step per rollout the ratio is exactly 1; raise "
                f"update.num_minibatches or update.num_iterations, or set it to {default}",
            )


def _choice(objective: Objective, on_policy: bool) -> Iterator[Finding]:
    """Settings by which tokens are chosen, and a penalty of what has moved where nothing has."""
    for key in CHOICE_KEYS.get(objective.spec.chooses or "", ()):
        if key.endswith("_ratio") and not 0 < getattr(objective, key) <= 1:
            yield Finding("contradiction", f"objective.{key}={getattr(objective, key)} must be above 0 and at most 1")
    low, high = objective.clip_cov_lb, objective.clip_cov_ub
    if objective.spec.chooses == "draw" and not low < high:
        yield Finding("contradiction", f"objective.clip_cov_lb={low} must be below objective.clip_cov_ub={high}")
    if on_policy and objective.spec.function is kl_cov:
        yield Finding(
            "no_effect",
            f"objective.loss_type={objective.loss_name} cannot act: with one optimizer step per rollout the ratio is "
            "exactly 1, where its penalty has no gradient; raise update.num_minibatches or update.num_iterations, or "
            "set objective=clip_cov",
        )


def _widths(objective: Objective) -> Iterator[Finding]:
    (low, high), bounds = objective.clip, objective.ratio_bounds
    chosen = bounds is not None and (objective.epsilon is not None or objective.epsilon_high is not None)
    if not low >= 0 or not high >= 0:
        yield Finding("contradiction", f"objective.epsilon={low} and epsilon_high={high} must not be negative")
    if objective.delta is not None and "delta" in objective.spec.reads:
        yield from _cap(objective, objective.delta)
    yield from _region(objective)
    if bounds is not None and bounds[1] == high < 1:
        yield Finding(
            "warning",
            f"objective.epsilon_high={high} is a bound of the ratio itself for loss_type={objective.loss_name}: below "
            "1 it caps every token that has not moved; raise it above 1",
        )
    if objective.importance_sampling_level != "token" and chosen and max(low, high) >= WIDE_SEQUENCE_CLIP:
        yield Finding(
            "warning",
            f"objective.epsilon={low}, epsilon_high={high} will almost never act at importance_sampling_level="
            f"{objective.importance_sampling_level}: the mean log-ratio of a sequence moves "
            "by hundredths; the paper uses 3e-4/4e-4",
        )
    if objective.importance_sampling_level == "token" and chosen and 0 < low < NARROW_TOKEN_CLIP:
        yield Finding(
            "warning",
            f"objective.epsilon={low}, epsilon_high={high} are widths for the ratio of a sequence; at "
            "importance_sampling_level=token they clip most tokens: usual values there are 0.2/0.27 "
            "(objective=grpo, or both null)",
        )


def _region(objective: Objective) -> Iterator[Finding]:
    """Widths of a trust region of probabilities: one that nothing leaves, or nearly everything."""
    clip, usual = objective.spec.clip, objective.spec.epsilons
    if clip is None or clip.bounds is not None or usual is None:
        return
    for key, own in zip(("epsilon", "epsilon_high"), usual, strict=True):
        width = getattr(objective, key)
        if width is not None and width >= 1 and objective.loss_type == "dppo_tv":
            yield Finding("no_effect", f"objective.{key}={width} cannot act: no probability moves by 1; lower it")
        if width is not None and 0 < width < NARROW_REGION * own:
            yield Finding(
                "warning",
                f"objective.{key}={width} leaves out nearly every token that has moved: for loss_type="
                f"{objective.loss_name} it is a distance of probabilities, {own} unless set",
            )


def _cap(objective: Objective, delta: float) -> Iterator[Finding]:
    least, clip = 1 + objective.clip[1], objective.spec.clip
    which = f"1 + epsilon_high = {least}: it would undo the upper clip"
    if clip is not None and clip.bounds is None:
        least, which = 1.0, "1: it would cap every token that has not moved"
    if delta < least:
        yield Finding("contradiction", f"objective.delta={delta} is below {which}; raise it")


def _loss(objective: Objective, steps: int, staleness: int) -> Iterator[Finding]:
    level = objective.importance_sampling_level
    if objective.spec.levels and level not in objective.spec.levels:
        yield Finding(
            "contradiction",
            f"objective.loss_type={objective.loss_name} is not defined for importance_sampling_level={level}; "
            f"use {' or '.join(objective.spec.levels)}",
        )
    correction = objective.mismatch
    if objective.spec.corrects_itself and correction is not None and correction.level != "token":
        yield Finding(
            "contradiction",
            f"objective.mismatch.level={correction.level} is not defined for loss_type={objective.loss_name}, whose "
            "own ratio takes in a weight per token; use mismatch=token_truncate or token_mask",
        )
    if not objective.spec.levels and staleness:
        yield Finding(
            "warning",
            f"objective.loss_type={objective.loss_name} has no importance ratio, but rollout.engine.staleness="
            f"{staleness} makes every optimizer step off-policy; set it to 0, or use a loss with a ratio "
            "(objective=grpo)",
        )
    elif not objective.spec.levels and steps > 1:
        yield Finding(
            "warning",
            f"objective.loss_type={objective.loss_name} has no importance ratio, but each rollout gives {steps} "
            "optimizer steps: all but the first are off-policy; set update.num_minibatches=1",
        )


def _longest(objective: Objective, of_rollouts: int | None) -> Iterator[Finding]:
    longest = objective.max_completion_length
    if longest < 1:
        yield Finding("contradiction", f"objective.max_completion_length={longest} must be at least 1")
    if objective.spec.aggregation != "max_tokens" and of_rollouts is not None and longest != of_rollouts:
        yield Finding(
            "no_effect",
            f"objective.max_completion_length={longest} has no effect on loss_type={objective.loss_name}, whose "
            "denominator counts what was sampled; leave it at ${rollout.max_completion_length}",
        )
