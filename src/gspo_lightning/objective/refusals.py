"""Settings of the objective that contradict each other or cannot have an effect, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gspo_lightning.objective.objective import Objective

WIDE_SEQUENCE_CLIP = 0.1
"""A sequence's mean log-ratio moves by hundredths in one rollout; a wider clip at sequence level hardly ever acts."""


@dataclass(frozen=True)
class Finding:
    """One line for the user; ``contradiction`` refuses, ``no_effect`` refuses unless allowed, ``warning`` warns."""

    kind: Literal["contradiction", "no_effect", "warning"]
    message: str


def check_objective(
    objective: Objective,
    *,
    num_iterations: int,
    num_minibatches: int,
    num_generations: int,
    prompts_per_rollout: int,
    has_reference: bool,
) -> list[Finding]:
    """All findings, in a fixed order. Each names the key and the fix."""
    steps = num_iterations * num_minibatches
    return [
        *_clip(objective, steps),
        *_loss(objective, steps),
        *_reference(objective, has_reference),
        *_counts(num_generations, num_minibatches, prompts_per_rollout),
    ]


def _clip(objective: Objective, steps: int) -> Iterator[Finding]:
    low, high = objective.clip
    chosen = [k for k in ("epsilon", "epsilon_high", "delta") if getattr(objective, k) is not None]
    if steps == 1 and chosen:
        yield Finding(
            "no_effect",
            f"objective.{chosen[0]} cannot act: with one optimizer step per rollout the ratio is exactly 1; raise "
            "update.num_minibatches or update.num_iterations, or set it to null",
        )
    if not objective.spec.uses_clip and chosen:
        yield Finding(
            "no_effect", f"objective.{chosen[0]} has no effect on loss_type={objective.loss_type}; set it to null"
        )
    if low < 0 or high < 0:
        yield Finding("contradiction", f"objective.epsilon={low} and epsilon_high={high} must not be negative")
    if objective.delta is not None and objective.delta < 1 + high:
        yield Finding(
            "contradiction",
            f"objective.delta={objective.delta} is below 1 + epsilon_high = {1 + high}: it would "
            "undo the upper clip; raise it",
        )
    if (
        objective.importance_sampling_level != "token"
        and objective.spec.uses_clip
        and max(low, high) >= WIDE_SEQUENCE_CLIP
    ):
        yield Finding(
            "warning",
            f"objective.epsilon={low}, epsilon_high={high} will hardly ever act at importance_sampling_level="
            f"{objective.importance_sampling_level}: the mean log-ratio of a sequence moves "
            "by hundredths; the paper uses 3e-4/4e-4",
        )


def _loss(objective: Objective, steps: int) -> Iterator[Finding]:
    level = objective.importance_sampling_level
    if level not in objective.spec.levels:
        yield Finding(
            "contradiction",
            f"objective.loss_type={objective.loss_type} is not defined for importance_sampling_level={level}; "
            f"use {' or '.join(objective.spec.levels)}",
        )
    if objective.loss_type == "reinforce" and steps > 1:
        yield Finding(
            "warning",
            f"objective.loss_type=reinforce has no importance ratio, but each rollout gives {steps} optimizer "
            "steps: all but the first are off-policy; set update.num_minibatches=1",
        )


def _reference(objective: Objective, has_reference: bool) -> Iterator[Finding]:
    if objective.beta > 0 and not has_reference:
        yield Finding("contradiction", "objective.beta is above 0 but there is no reference; set objective.beta=0")
    if objective.beta < 0:
        yield Finding("contradiction", f"objective.beta={objective.beta} would reward divergence; it must be 0 or more")
    if objective.beta == 0 and objective.kl_importance_weighted:
        yield Finding("no_effect", "objective.kl_importance_weighted has no effect with objective.beta=0")


def _counts(num_generations: int, num_minibatches: int, prompts_per_rollout: int) -> Iterator[Finding]:
    if num_generations < 2:
        yield Finding(
            "contradiction",
            f"rollout.num_generations={num_generations} must be at least 2; a group of one "
            "has no one to be compared with",
        )
    if prompts_per_rollout % num_minibatches:
        yield Finding(
            "contradiction",
            f"update.num_minibatches={num_minibatches} does not divide data.prompts_per_rollout={prompts_per_rollout}",
        )
